#!/bin/bash
# Stage 1: 1_mm_align.sh [BASE_MODEL] [OUTPUT] [FIELD=VALUE ...]. The model comes to checkpoints/OUTPUT/model.
. "$(dirname "$0")/launch.sh"
base=${1:-lmsys/vicuna-7b-v1.5} output=${2:-llava-v1.5-7b-mm-align} MICRO=32

launch vila_7b/1_align "name='$output'" "model.llm=$base" "output.dir=checkpoints/$output" "${@:3}"
