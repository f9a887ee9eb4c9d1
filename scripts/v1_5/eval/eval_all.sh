#!/bin/bash
# All ten benchmarks of the published table: eval_all.sh CHECKPOINT NAME [CONV_MODE] [OPTIONS OF vila eval ...].
# Reads playground/data/eval, writes eval_output/NAME; goes on where it was stopped.
if [ -z "$2" ]; then
    echo "usage: $0 CHECKPOINT NAME [CONV_MODE] [OPTION ...]" >&2
    exit 2
fi
template=()
[ -n "${3:-}" ] && [ "${3#-}" = "$3" ] && template=(--template "$3")
exec vila eval "$1" --benchmarks all --data "${EVAL_DATA:-playground/data/eval}" --out "eval_output/$2" \
    "${template[@]}" "${@:3+(${#template[@]} > 0)}"
