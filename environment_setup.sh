#!/usr/bin/env bash
# Install vila in editable form.
#
#   ./environment_setup.sh          into the active virtual or conda environment
#   ./environment_setup.sh DIR      into a virtual environment at DIR, created if absent
#
# PYTHON=python3.12 names the Python; TORCH_INDEX=URL adds a package index for PyTorch (see `make help`).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

python=${PYTHON:-python3}
target=${1:-}

if [[ -z $target && -z ${VIRTUAL_ENV:-} && -z ${CONDA_PREFIX:-} ]]; then
    echo "No virtual or conda environment is active. Activate one, or name a directory: $0 .venv" >&2
    exit 2
fi
if ! version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))'); then
    echo "vila needs Python 3.11 or newer, but '$python' is ${version:-not a working Python}." >&2
    echo "Name another: PYTHON=python3.12 $0 $target" >&2
    exit 1
fi

if [[ -n $target ]]; then
    [[ -x $target/bin/pip ]] || "$python" -m venv "$target"
    python=$target/bin/python
fi
"$python" -m pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -e .
echo "Done. Next: ${target:+$target/bin/}vila doctor"
