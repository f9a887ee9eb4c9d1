"""Write the files for the benchmark servers: copy_predictions.py NAME, from the run in eval_output/NAME.

They are written to playground/data/predictions_upload/NAME, one directory per benchmark; benchmarks that were not run
are listed. Calls `vila submit`.
"""

import sys

from vila.cli.main import main

if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
    sys.exit(f"usage: {sys.argv[0]} NAME")
name = sys.argv[1]
main(["submit", f"eval_output/{name}", "--output", f"playground/data/predictions_upload/{name}"])
