"""Run `vila eval` on the ten mini datasets in separate processes, which may be killed, and read its output."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.eval.mini_datasets import TEN
from tests.train.ranks import run_ranks

QUESTIONS = 100
"""Of all ten benchmarks."""
_SERVERS = ("vqav2", "vizwiz", "mmbench", "mmbench_cn", "seed")


@dataclass(frozen=True)
class Death:
    """Point at which a process kills itself with SIGKILL.

    groups:     after so many groups of answers are on the disk, over all benchmarks; 0: never for this reason.
    torn:       with half a line of the next group behind them.
    benchmarks: after so many benchmarks are finished; 0: never for this reason.
    rank:       of the process that dies.
    """

    groups: int = 0
    torn: bool = False
    benchmarks: int = 0
    rank: int = 0


def evaluate(model: Path, data: Path, out: Path, death: Death | None = None, names: str = "all") -> Any:
    """Run `vila eval` with batches of two images and short answers; return 0 or its error output."""
    from vila.cli.main import main
    from vila.eval import runner
    from vila.eval.benchmark import BENCHMARKS

    runner._BATCH_GROUPS = 2
    for name in TEN:
        BENCHMARKS[name].max_new_tokens = 6  # type: ignore[attr-defined]
    if death and int(os.environ.get("RANK", "0")) == death.rank:
        _arm(death)
    words = ["eval", model, "--benchmarks", names, "--data", data, "--output", out, "--dtype", "float32", "--json"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as complaints:
        try:
            main([str(word) for word in words])
        except SystemExit as ended:
            return complaints.getvalue() if ended.code else 0
    raise AssertionError("a command always ends with a status")


def evaluated(model: Path, data: Path, out: Path, death: Death | None = None, world: int = 1, **options: Any) -> Any:
    """Return the outcome of each of `world` processes: 0, the error output, or -9 if it was killed."""
    names = options.pop("names", "all")
    return run_ranks(world, evaluate, model, data, out, death, names, **options)


def _arm(death: Death) -> None:
    from vila.eval import runner
    from vila.eval.predictions import Predictions

    add, run = Predictions.add, runner.run_benchmark
    counts = {"groups": 0, "benchmarks": 0}

    def dying_add(self: Predictions, rank: int, *rest: Any) -> None:
        add(self, rank, *rest)
        counts["groups"] += 1
        if counts["groups"] == death.groups:
            if death.torn:
                with (self.folder / f"part-{rank}.jsonl").open("ab") as stream:
                    # In the midst of a character of three bytes.
                    stream.write('{"id": "half a line, \u65b9'.encode()[:-1])
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_run(*arguments: Any, **options: Any) -> Any:
        result = run(*arguments, **options)
        counts["benchmarks"] += 1
        if counts["benchmarks"] == death.benchmarks:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Predictions.add = dying_add  # type: ignore[method-assign]
    runner.run_benchmark = dying_run


def left_behind(out: Path, data: Path, submissions: Path) -> dict[str, Any]:
    """All that a finished run leaves, and the files for the servers made of it; without times and rates."""
    from vila.core.reading import read_json
    from vila.eval.submit import submit_run

    found: dict[str, Any] = {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "speed.json" and not path.name.startswith("report.")
    }
    # Model and data lie side by side; runs name them relative to themselves.
    beside = f"{Path(os.path.relpath(data.parent, out)).as_posix()}/"
    found["eval.json"] = found["eval.json"].replace(beside.encode(), b"STAND/")
    report = json.loads(json.dumps(read_json(out / "report.json")).replace(beside, "STAND/"))
    for each in report["benchmarks"].values():
        each.pop("speed")
    found["report.json"] = report
    found["report.md"] = _untimed((out / "report.md").read_text(), out.name).replace(beside, "STAND/")
    written, left_out = submit_run(out, submissions, data, {name: name for name in TEN})
    found["submissions"] = {one.benchmark: (one.path.suffix, one.path.read_bytes()) for one in written}
    found["left out of submissions"] = left_out
    assert sorted(found["submissions"]) == sorted(_SERVERS)
    return found


def _untimed(markdown: str, folder: str) -> str:
    text = re.sub(r"## Speed\n.*?(?=\n## )", "", markdown, flags=re.DOTALL)
    return text.replace(f"- folder: {folder}\n", "").replace(f"- folder: {folder.replace('_', chr(92) + '_')}\n", "")


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Assert that all files are equal, naming those that are not."""
    assert sorted(ours) == sorted(theirs)
    different = [name for name in ours if ours[name] != theirs[name]]
    assert not different, {name: (ours[name], theirs[name]) for name in different}


def asked(out: Path) -> int:
    """Questions that were answered in the sessions that came to an end, over all benchmarks."""
    from vila.core.reading import read_json

    return sum(read_json(path)["answered"] for path in out.glob("*/speed.json"))


def on_the_disk(out: Path) -> int:
    """Whole lines of answers that lie in a run's folder, over all benchmarks."""
    texts = [path.read_bytes() for kind in ("part-*", "predictions") for path in out.glob(f"*/{kind}.jsonl")]
    return sum(text.count(b"\n") for text in texts)
