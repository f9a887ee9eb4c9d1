#!/bin/bash
# All ten benchmarks of the published table: eval_all.sh CHECKPOINT NAME [CONV_MODE] [OPTIONS OF vila eval ...].
# Reads playground/data/eval, writes eval_output/NAME with BENCHMARK.txt for each; goes on where it was stopped.
if [ -z "$2" ]; then
    echo "usage: $0 CHECKPOINT NAME [CONV_MODE] [OPTION ...]" >&2
    exit 2
fi
data="${EVAL_DATA:-playground/data/eval}"
out="eval_output/$2"
template=()
[ -n "${3:-}" ] && [ "${3#-}" = "$3" ] && template=(--template "$3")
[ $# -gt 2 ] && [ "${3#-}" = "$3" ] && options=("${@:4}") || options=("${@:3}")
vila eval "$1" --benchmarks all --data "$data" --output "$out" "${template[@]}" "${options[@]}"
status=$?
for name in vqav2 gqa vizwiz scienceqa textvqa pope mme mmbench mmbench_cn seed; do
    [ -f "$out/$name/predictions.jsonl" ] || continue
    vila score "$name" --data "$data" --predictions "$out/$name" >"$out/$name.txt" 2>&1
done
exit $status
