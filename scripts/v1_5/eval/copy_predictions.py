"""The files for the benchmarks' servers: copy_predictions.py NAME, of the run in eval_output/NAME.

They come to playground/data/predictions_upload/NAME, each in its benchmark's folder; what was not run is left out and
said. `vila submit` does the work.
"""

import sys

from vila.cli.main import main

if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
    sys.exit(f"usage: {sys.argv[0]} NAME")
name = sys.argv[1]
main(["submit", f"eval_output/{name}", "--output", f"playground/data/predictions_upload/{name}"])
