#!/bin/bash
# Stage 3: 3_sft.sh STAGE2 OUTPUT [FIELD=VALUE ...]. STAGE2 is a name below checkpoints/, or the path of a model.
. "$(dirname "$0")/launch.sh"
need "$2" "STAGE2 OUTPUT [FIELD=VALUE ...]"
stage2=$(model_of "$1") || exit
MICRO=16
launch vila_7b/3_sft "name='$2'" "model.path=$stage2" "output.dir=checkpoints/$2" "${@:3}"
