# Sourced by the scripts of this directory. `launch RECIPE FIELD=VALUE...` is `vila train` on every available GPU.
#
# BATCH_SIZE      samples that a GPU takes at a time; the global batch stays that of the recipe, by accumulation
# ACC_STEP        times that it does so in a step: the global batch becomes BATCH_SIZE x ACC_STEP x GPUs
# NPROC_PER_NODE  processes of a node, where it is not one for each GPU
# MASTER_PORT     of the first node, 25001
# VILA_DRY_RUN    print the resolved recipe and stop
# SLURM_JOB_NUM_NODES, SLURM_PROCID and SLURM_JOB_NODELIST say, as `srun` sets them, which of how many nodes this is.

# Whether the first argument is there; else how to call this script.
need() {
    [ -n "$1" ] || { echo "usage: $0 $2" >&2; exit 2; }
}

# The model directory of a finished run: by its name below checkpoints/, by its path, or a model itself.
model_of() {
    local folder
    for folder in "checkpoints/$1" "$1"; do
        [ -f "$folder/model/config.json" ] && { echo "$folder/model"; return; }
    done
    for folder in "checkpoints/$1" "$1"; do
        [ -f "$folder/mm_projector.bin" ] && [ ! -f "$folder/tokenizer_config.json" ] && {
            echo "$folder: a projector of the original without its language model; convert it first:" \
                "vila convert $folder $folder/model --layout native --model-base BASE_MODEL" >&2
            return 2
        }
        [ -f "$folder/config.json" ] && { echo "$folder"; return; }
    done
    echo "$1: no trained model there, nor in checkpoints/$1; the stage before has not finished" >&2
    return 2
}

processes() {
    local gpus
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
    else
        gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
    fi
    echo $((gpus > 0 ? gpus : 1))
}

launch() {
    local nodes=${SLURM_JOB_NUM_NODES:-1} head=127.0.0.1 each
    each=${NPROC_PER_NODE:-$(processes)}
    # They go before the fields that the script was given: those have the last word.
    local micro=${BATCH_SIZE:-$MICRO} sizes=()
    [ -n "${BATCH_SIZE:-}" ] && sizes+=("batch.micro=$BATCH_SIZE")
    [ -n "${ACC_STEP:-}" ] && sizes+=("batch.samples=$((micro * ACC_STEP * each * nodes))")
    set -- train "$1" "${sizes[@]}" "${@:2}"
    if [ -n "${VILA_DRY_RUN:-}" ]; then
        exec vila "$@" --dry-run
    elif [ $((nodes * each)) -eq 1 ]; then
        exec vila "$@"
    fi
    [ -n "${SLURM_JOB_NODELIST:-}" ] && head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    exec torchrun --nnodes="$nodes" --node-rank="${SLURM_PROCID:-0}" --nproc-per-node="$each" \
        --master-addr="$head" --master-port="${MASTER_PORT:-25001}" --no-python vila "$@"
}
