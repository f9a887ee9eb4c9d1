"""Run mutated inputs in child processes with time and memory limits, and classify the outcomes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tests.mutation.mutate import mutate
from tests.mutation.targets import Target, random_of
from vila.core.errors import VilaError

SECONDS = 20
"""CPU seconds that one input may take; a valid one takes less than one."""
MEMORY = 3 << 30
"""Address space, in bytes, that a child may use in addition to its initial size."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of one input: `correct`, `refused`, or a fault (`unnamed`, `traceback`, `slow`, `memory`, `died`)."""

    target: str
    seed: int
    change: str
    file: str
    kind: str
    text: str = ""

    @property
    def is_fault(self) -> bool:
        return self.kind not in ("correct", "refused")


def run_inputs(target: Target, seeds: range, scratch: Path) -> list[Outcome]:
    """Mutate a valid input of `target` once per seed and read it; outcomes in the order of the seeds.

    A child process reads the valid input and all mutated ones; where one kills or blocks it, another child continues.
    Nothing is read in this process: PyAV's threads do not survive a fork.
    """
    valid = scratch / "valid"
    valid.mkdir(parents=True)
    target.write(valid)
    log = scratch / "outcomes.jsonl"
    outcomes: list[Outcome] = []
    pending = list(seeds)
    while pending:
        log.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            _child(target, pending, scratch, valid, log)
        status = _wait(child, log)
        done = [Outcome(**json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []
        outcomes += [outcome for outcome in done if outcome.kind != "started"]
        pending = pending[len(outcomes) - (len(seeds) - len(pending)) :]
        if pending and done and done[-1].kind == "started":
            last = done[-1]
            kind = "slow" if status == -signal.SIGKILL else "died"
            outcomes.append(Outcome(last.target, last.seed, last.change, last.file, kind, f"exit status {status}"))
            pending = pending[1:]
        elif pending and not done:
            raise RuntimeError(f"{target.name}: the child ended with {status} before its first input")
    return outcomes


def _wait(child: int, log: Path) -> int:
    """Return the exit status of the child; kills it if an input blocks in code that no signal interrupts."""
    started = time.time()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        last_progress = log.stat().st_mtime if log.exists() else started
        if time.time() - last_progress > 6 * SECONDS:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.05)


def _child(target: Target, seeds: list[int], scratch: Path, valid: Path, log: Path) -> None:
    try:
        # The threads of this process's OpenMP pool did not survive the fork; a parallel region would wait for them.
        torch.set_num_threads(1)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        signal.signal(signal.SIGPROF, _too_slow)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        shutil.rmtree(scratch / "input", ignore_errors=True)
        shutil.copytree(valid, scratch / "input", symlinks=True)
        target.use(scratch / "input")
        os.dup2(null, 2)
        with log.open("a") as stream:
            for seed in seeds:
                for outcome in _read_one(target, seed, scratch, valid):
                    stream.write(json.dumps(asdict(outcome)) + "\n")
                    stream.flush()
    except BaseException:  # noqa: BLE001 -- the child must not return into pytest
        traceback.print_exc()
        os._exit(3)
    os._exit(0)


def _too_slow(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s of CPU")


def _read_one(target: Target, seed: int, scratch: Path, valid: Path):
    root = scratch / "input"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(valid, root, symlinks=True)
    draw = random_of(seed)
    file = draw.choice(target.files(root))
    change = mutate(file, draw)
    name = file.relative_to(root).as_posix()

    def outcome(kind: str, text: str = "") -> Outcome:
        return Outcome(target.name, seed, change, name, kind, text[-1500:])

    yield outcome("started")
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        target.use(root)
        found = outcome("correct")
    except VilaError as error:
        # The damaged file, or another one of the input that no longer fits it.
        named = any(path.name in str(error) for path in [root, *root.rglob("*")])
        found = outcome("refused" if named else "unnamed", f"{type(error).__name__}: {error}")
    except MemoryError as error:
        found = outcome("memory", "".join(traceback.format_exception(error)))
    except TimeoutError as error:
        found = outcome("slow", "".join(traceback.format_exception(error)))
    except Exception as error:  # noqa: BLE001 -- the fault that this test looks for
        found = outcome("traceback", "".join(traceback.format_exception(error)))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    yield found
