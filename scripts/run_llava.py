"""Command of the original code: python scripts/run_llava.py --model-path ... --query "..." --image-file a.png."""

import sys

from vila.cli.main import main

main(["run", *sys.argv[1:]])
