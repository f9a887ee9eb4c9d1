"""What looks at a model while it learns: answers to fixed prompts, and evaluations; handed to the loop as listeners.

Training goes on afterwards as if nobody had looked: the same modes, the same random numbers, the same bits.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from vila.config.schema import Prompt, Recipe
from vila.core.errors import ConfigError, VilaError
from vila.core.files import cache_dir, portable_path, write_json
from vila.core.progress import SILENT, Events, task
from vila.core.types import Image, Message
from vila.engine.engine import Engine
from vila.eval.benchmark import BENCHMARKS, Benchmark, missing_media
from vila.eval.runner import BenchmarkRun, run_benchmark
from vila.model.processor import VilaProcessor
from vila.starter.easy_vqa import obtain_easy_vqa
from vila.train.checkpoint import random_state, set_random_state
from vila.train.metrics_log import MetricsLog, read_metrics
from vila.train.trackers import open_trackers
from vila.train.trainer import Trainer, TrainerCallback


def check_monitor(recipe: Recipe, events: Events = SILENT, *, fetch: bool = True) -> Benchmark | None:
    """Check what `monitor` names before weights are read; returns the benchmark of evaluations.

    fetch: download easy-VQA if no other benchmark or directory is named and it is not here.
    Raises ConfigError for an image or a directory that is not there, DataError for a benchmark that cannot be read,
    UnknownNameError for one that is not known.
    """
    monitor = recipe.monitor
    _check_pictures(monitor.prompts)
    if not monitor.eval_every_steps:
        return None
    BENCHMARKS[monitor.eval_benchmark]
    if not fetch and not monitor.eval_data and monitor.eval_benchmark == "easy_vqa":
        return None
    return _open(monitor.eval_benchmark, monitor.eval_data, monitor.eval_items, events)


def listeners_of(
    recipe: Recipe, processor: VilaProcessor, events: Events = SILENT, benchmark: Benchmark | None = None
) -> list[TrainerCallback]:
    """What `monitor` asks for: prompts, evaluations, and trackers, which come last. Every process calls it.

    benchmark: what `check_monitor` returned; None calls it, with its errors.
    """
    monitor, folder = recipe.monitor, recipe.output.dir
    benchmark = benchmark or check_monitor(recipe, events)
    listeners: list[TrainerCallback] = []
    if monitor.prompts:
        listeners.append(PromptListener(monitor.prompts, monitor.prompt_every_steps, folder, processor, events))
    if benchmark:
        listeners.append(EvaluationListener(benchmark, monitor.eval_every_steps, folder, processor, events))
    return [*listeners, *open_trackers(recipe, folder)]


class PromptListener(TrainerCallback):
    """Answers the same prompts every few steps and at the end; lines of `answers.jsonl`."""

    def __init__(
        self, prompts: tuple[Prompt, ...], every: int, folder: Path, processor: VilaProcessor, events: Events
    ) -> None:
        """every: steps between answers, 0 for the end alone."""
        self.prompts, self.every, self.processor, self.events = prompts, every, processor, events
        self.folder = folder
        self._log = _Log(folder / "answers.jsonl")

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Answer when it is time."""
        self._log.open(trainer, metrics["step"] - 1)
        if self.every and metrics["step"] % self.every == 0:
            self._answer(trainer, metrics["step"])

    def on_train_end(self, trainer: Trainer) -> None:
        """Answer once more, unless the last step just did."""
        self._log.open(trainer, trainer.progress.step)
        if trainer.progress.step not in self._log.steps:
            self._answer(trainer, trainer.progress.step)

    def _answer(self, trainer: Trainer, step: int) -> None:
        with task(self.events, f"prompts after step {step:,}", len(self.prompts), "answers"), asked(trainer):
            engine = Engine(trainer.state.model, self.processor)
            for prompt in self.prompts:
                row: dict[str, Any] = {"prompt": prompt.text, "image": portable_path(prompt.image, self.folder)}
                parts: list[Image | str] = [*([Image(prompt.image)] if prompt.image else []), prompt.text]
                try:
                    row["answer"] = engine.generate([Message.of("user", *parts)])
                except VilaError as error:
                    # A prompt that does not fit is no reason to lose a run.
                    row |= {"answer": "", "error": str(error)}
                    self.events.log(f"{prompt.text!r} has no answer: {error}")
                self._log.write(trainer, step, row)
                self.events.advanced(f"prompts after step {step:,}")


class EvaluationListener(TrainerCallback):
    """Runs a benchmark every few steps and at the end; lines of `evaluations.jsonl`, and the best one in `best.json`.

    The predictions of each are below `evaluations/`.
    """

    def __init__(
        self, benchmark: Benchmark, every: int, folder: Path, processor: VilaProcessor, events: Events
    ) -> None:
        self.benchmark, self.every, self.folder, self.processor, self.events = (
            benchmark, every, folder, processor, events,
        )  # fmt: skip
        self._log = _Log(folder / "evaluations.jsonl")

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Evaluate when it is time."""
        if self._log.open(trainer, metrics["step"] - 1):
            self._note_best(trainer)
        if metrics["step"] % self.every == 0:
            self._evaluate(trainer, metrics["step"])

    def on_train_end(self, trainer: Trainer) -> None:
        """Evaluate the finished model, unless the last step just did."""
        self._log.open(trainer, trainer.progress.step)
        if trainer.progress.step not in self._log.steps:
            self._evaluate(trainer, trainer.progress.step)

    def _evaluate(self, trainer: Trainer, step: int) -> None:
        began = time.monotonic()
        with asked(trainer), self._place(trainer, step) as out:
            result = run_benchmark(
                Engine(trainer.state.model, self.processor),
                self.benchmark,
                out,
                model_id=f"{trainer.name} after step {step}",
                events=self.events if trainer.world.is_main else SILENT,
            )
        assert result  # every process asks everything, as dealt weights need all of them at every token
        self._log.write(trainer, step, _row(result, time.monotonic() - began))
        self._note_best(trainer)

    @contextmanager
    def _place(self, trainer: Trainer, step: int) -> Iterator[Path]:
        """Where predictions go: nothing may lie there, or one process would skip what the others ask."""
        if trainer.world.is_main:
            out = self.folder / "evaluations" / f"step-{step:08d}"
            shutil.rmtree(out, ignore_errors=True)
            yield out
        else:
            with tempfile.TemporaryDirectory() as elsewhere:
                yield Path(elsewhere)

    def _note_best(self, trainer: Trainer) -> None:
        if not trainer.world.is_main:
            return
        path = self.folder / "best.json"
        scored = [row for row in self._log.read() if row.get("score") is not None]
        if scored:
            # The first of equals, whose checkpoint has been kept since.
            best = max(scored, key=lambda row: (row["score"], -row["step"]))
            write_json(path, {key: best[key] for key in ("step", "benchmark", "score")})
        else:
            path.unlink(missing_ok=True)


@contextmanager
def asked(trainer: Trainer) -> Iterator[None]:
    """Inside, the model can be asked on every process: dealt weights put together, eval mode, random numbers put aside.

    Afterwards each module that was in train mode is in it again, and each generator gives what it would have given.
    """
    modes = {module: module.training for module in trainer.state.model.modules()}
    state = random_state()
    try:
        with trainer.state.unsharded_model():
            trainer.state.model.eval()
            yield
    finally:
        _restore(modes)
        set_random_state(state)


def _restore(modes: dict[nn.Module, bool]) -> None:
    for module, training in modes.items():
        # `train()` would also change what is inside.
        module.training = training


class _Log:
    """A file with lines of some steps. The process that writes opens it when it knows where the run goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: set[int] = set()
        self._file: MetricsLog | None = None
        self._is_open = False

    def open(self, trainer: Trainer, step: int) -> bool:
        """Drop the lines of steps after `step`, which the run is about to repeat; the first call alone does."""
        if self._is_open:
            return False
        self._is_open = True
        # All processes look at the same file, and must agree on what is there.
        self.steps = {row["step"] for row in read_metrics(self.path) if row["step"] <= step}
        if trainer.world.is_main:
            self._file = MetricsLog(self.path, step)
        return True

    def write(self, trainer: Trainer, step: int, row: dict[str, Any]) -> None:
        self.steps.add(step)
        if self._file:
            self._file.write(step=step, **row)

    def read(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)


def _row(run: BenchmarkRun, seconds: float) -> dict[str, Any]:
    result = run.result
    return {
        "benchmark": run.benchmark,
        "score": result.score if result else None,
        "unit": result.unit if result else "",
        "items": len(run.predictions) + len(run.failed),
        "seconds": round(seconds, 2),
        **({"problem": run.problem} if run.problem else {}),
    }


def _check_pictures(prompts: tuple[Prompt, ...]) -> None:
    problems = [
        f"{number}.image: {prompt.image!r} is not a file"
        for number, prompt in enumerate(prompts)
        if prompt.image and not Path(prompt.image).is_file()
    ]
    if problems:
        raise ConfigError.collect("monitor.prompts", problems)


def _open(name: str, data: str, count: int, events: Events) -> Benchmark:
    """The benchmark of an evaluation. easy-VQA is fetched where no directory is named."""
    opener = BENCHMARKS[name]
    if not data and name != "easy_vqa":
        raise ConfigError(f"monitor.eval_data: {name} needs the directory of its data, such as playground/data/eval")
    benchmark = opener(Path(data) if data else obtain_easy_vqa(cache_dir(), events), count)
    if gone := missing_media(benchmark.items()):
        raise ConfigError(
            f"monitor.eval_data: {len(gone):,} pictures of {name} are missing, the first {gone[0]}; evaluations would "
            "say less than they seem to"
        )
    return benchmark
