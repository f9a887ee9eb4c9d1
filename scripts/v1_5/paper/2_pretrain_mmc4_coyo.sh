#!/bin/bash
# Stage 2: 2_pretrain_mmc4_coyo.sh CODE_PATH BASE_MODEL STAGE1 OUTPUT [FIELD=VALUE ...].
# Works in CODE_PATH, on what 1_mm_align.sh left in checkpoints/STAGE1, which holds BASE_MODEL already.
. "$(dirname "$0")/launch.sh"
need "$4" "CODE_PATH BASE_MODEL STAGE1 OUTPUT [FIELD=VALUE ...]"
cd "$1" || exit 2
stage1=$(model_of "$3") || exit
base=$(sed -n "s/^  llm: //p" "${stage1%model}recipe.yaml" 2>/dev/null | tr -d "'\"")
if [ -n "$base" ] && [ "$base" != "$2" ]; then
    echo "$3: was trained with $base, not with $2; give that, or another STAGE1" >&2
    exit 2
fi
MICRO=8
launch vila_7b/2_pretrain "name='$4'" "model.path=$stage1" "output.dir=checkpoints/$4" "${@:5}"
