"""Measure the wall-clock start-up time of commands, with `python -c "import torch"` in the same run.

    python benchmarks/startup.py --model MODEL --int4 MODEL_INT4

Runs each command in a new process, in turn, after one unmeasured round. MODEL should be small, so that reading it does
not count; MODEL_INT4 is an INT4 checkpoint, asked for one token. Prints a markdown table of medians and the goals;
exits with status 1 if a goal is missed. Wait until the machine is idle.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

TORCH = "import torch"
HELP_S, INFO_S = 0.5, 0.8
RUN_RATIO, RUN_EXTRA_S = 1.3, 1.0
PACKAGES = ("torch", "transformers", "onnxruntime", "typer", "rich")
MACHINE = "import json, torch; print(json.dumps([torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]))"


def first_output(command: list[str], *, whole: bool) -> float:
    """Return seconds from the start of a process to its first byte of standard output; `whole`: to its end."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        if not whole:
            process.stdout.read(1)
            seconds = time.perf_counter() - start
        _, errors = process.communicate()
        if whole:
            seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}\n{errors.decode()}")
    return seconds


def main() -> int:
    """Measure and print; return 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="small checkpoint")
    parser.add_argument("--int4", help="INT4 checkpoint for `vila run`")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    vila = [sys.executable, "-m", "vila"]
    commands = {
        TORCH: [sys.executable, "-c", TORCH],
        "vila --help": [*vila, "--help"],
        "vila info MODEL": [*vila, "info", arguments.model],
    }
    if arguments.int4:
        words = ["run", arguments.int4, "-p", "Hello", "--max-new-tokens", "1"]
        commands["vila run MODEL_INT4, first word"] = [*vila, *words]
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for repeat in range(arguments.repeats + 1):
        for name, command in commands.items():
            taken = first_output(command, whole=not name.startswith("vila run"))
            if repeat:
                seconds[name].append(taken)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    run_s = RUN_RATIO * median[TORCH] + RUN_EXTRA_S
    goals = dict(zip(commands, (None, HELP_S, INFO_S, run_s), strict=False))
    isa, threads = json.loads(subprocess.check_output([sys.executable, "-c", MACHINE]))
    today = datetime.datetime.now(tz=datetime.UTC).date()
    print(f"{today}, {cpu_name()}, {isa}, {os.cpu_count()} CPUs, {threads} threads,")
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    print(f"Python {platform.python_version()}, {versions}; load average {os.getloadavg()[0]:.1f}\n")
    print("| command | seconds, median | minimum | goal |\n|---|---|---|---|")
    for name, values in seconds.items():
        goal = f"{goals[name]:.2f}" if goals[name] else ""
        print(f"| `{name}` | {median[name]:.2f} | {min(values):.2f} | {goal} |")
    return int(any(goal is not None and median[name] > goal for name, goal in goals.items()))


def cpu_name() -> str:
    """Return the model name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    sys.exit(main())
