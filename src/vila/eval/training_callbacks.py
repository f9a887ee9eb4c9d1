"""Evaluation during training: trainer callbacks that answer fixed prompts and run a benchmark every few steps.

They do not affect training: modes and random number generators are restored, and losses stay bit-identical.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vila.config.schema import Prompt
from vila.core.errors import VilaError
from vila.core.files import portable_path, write_json
from vila.core.progress import SILENT, Events, task
from vila.core.types import Image, Message
from vila.engine.engine import Engine
from vila.eval.benchmark import Benchmark
from vila.eval.runner import BenchmarkRun, run_benchmark
from vila.model.processor import VilaProcessor
from vila.train.metrics import MetricsLog, read_metrics
from vila.train.random_state import random_state, set_random_state
from vila.train.trainer import Trainer, TrainerCallback


class PeriodicCallback(TrainerCallback):
    """Runs every few steps and at the end of training, and appends a record of each run to a log.

    The log is opened at the first call, when the step that training resumes from is known.
    """

    def __init__(self, every: int, log: Path) -> None:
        """every: steps between runs; 0: only at the end."""
        self.every, self.log = every, log
        self._steps: set[int] | None = None
        self._file: MetricsLog | None = None

    def run(self, trainer: Trainer, step: int) -> None:
        """Run after a step."""
        raise NotImplementedError

    def resumed(self, trainer: Trainer) -> None:
        """React to the records of earlier steps, once, when the log is open."""

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Run every `every` steps."""
        step = metrics["step"]
        self._open(trainer, step - 1)
        if self.every and step % self.every == 0:
            self.run(trainer, step)

    def on_train_end(self, trainer: Trainer) -> None:
        """Run, unless the last step did."""
        if trainer.progress.step not in self._open(trainer, trainer.progress.step):
            self.run(trainer, trainer.progress.step)

    def write(self, trainer: Trainer, step: int, row: dict[str, Any]) -> None:
        """Append a record."""
        self._open(trainer, step).add(step)
        if self._file:
            self._file.write(step=step, **row)

    def _open(self, trainer: Trainer, step: int) -> set[int]:
        """Return the steps with records; the first call drops those after `step`."""
        if self._steps is None:
            # Every rank reads the same file and must get the same result.
            self._steps = {row["step"] for row in read_metrics(self.log) if row["step"] <= step}
            if trainer.world.is_main:
                self._file = MetricsLog(self.log, step)
            self.resumed(trainer)
        return self._steps


class PromptCallback(PeriodicCallback):
    """Answers fixed prompts every few steps and at the end of training; appends to `answers.jsonl`."""

    def __init__(
        self, prompts: tuple[Prompt, ...], every: int, folder: Path, processor: VilaProcessor, events: Events
    ) -> None:
        super().__init__(every, folder / "answers.jsonl")
        self.prompts, self.processor, self.events, self.folder = prompts, processor, events, folder

    def run(self, trainer: Trainer, step: int) -> None:
        """Answer the prompts."""
        with task(self.events, f"prompts after step {step:,}", len(self.prompts), "answers"), inference_mode(trainer):
            engine = Engine(trainer.state.model, self.processor)
            for prompt in self.prompts:
                row: dict[str, Any] = {"prompt": prompt.text, "image": portable_path(prompt.image, self.folder)}
                parts: list[Image | str] = [*([Image(prompt.image)] if prompt.image else []), prompt.text]
                try:
                    row["answer"] = engine.generate([Message.of("user", *parts)])
                except VilaError as error:
                    # A prompt that exceeds the context must not stop the run.
                    row |= {"answer": "", "error": str(error)}
                    self.events.log(f"prompt {prompt.text!r} has no answer: {error}")
                self.write(trainer, step, row)
                self.events.advanced(f"prompts after step {step:,}")


class EvaluationCallback(PeriodicCallback):
    """Runs a benchmark every few steps and at the end of training.

    Appends to `evaluations.jsonl`, writes the best score to `best.json` and predictions below `evaluations/`.
    """

    def __init__(
        self, benchmark: Benchmark, every: int, folder: Path, processor: VilaProcessor, events: Events
    ) -> None:
        super().__init__(every, folder / "evaluations.jsonl")
        self.benchmark, self.processor, self.events, self.folder = benchmark, processor, events, folder

    def resumed(self, trainer: Trainer) -> None:
        """Write the best score of the steps that are left."""
        self._write_best(trainer)

    def run(self, trainer: Trainer, step: int) -> None:
        """Evaluate the model."""
        began = time.monotonic()
        with inference_mode(trainer), self._output_dir(trainer, step) as out:
            result = run_benchmark(
                Engine(trainer.state.model, self.processor),
                self.benchmark,
                out,
                model_id=f"{trainer.name} after step {step}",
                events=self.events if trainer.world.is_main else SILENT,
            )
        assert result  # every rank answers every question: sharded weights need all ranks at every token
        self.write(trainer, step, _record(result, time.monotonic() - began))
        self._write_best(trainer)

    @contextmanager
    def _output_dir(self, trainer: Trainer, step: int) -> Iterator[Path]:
        """Provide an empty output directory; existing predictions would make ranks skip different questions."""
        if trainer.world.is_main:
            out = self.folder / "evaluations" / f"step-{step:08d}"
            shutil.rmtree(out, ignore_errors=True)
            yield out
        else:
            with tempfile.TemporaryDirectory() as temporary:
                yield Path(temporary)

    def _write_best(self, trainer: Trainer) -> None:
        if not trainer.world.is_main:
            return
        path = self.folder / "best.json"
        scored = [row for row in read_metrics(self.log) if row.get("score") is not None]
        if scored:
            # The first of equals, whose checkpoint has been kept since.
            best = max(scored, key=lambda row: (row["score"], -row["step"]))
            write_json(path, {key: best[key] for key in ("step", "benchmark", "score")})
        else:
            path.unlink(missing_ok=True)


@contextmanager
def inference_mode(trainer: Trainer) -> Iterator[None]:
    """Unshard the model and set eval mode on every rank; afterwards restore all modes and random number generators."""
    modes = {module: module.training for module in trainer.state.model.modules()}
    state = random_state()
    try:
        with trainer.state.unsharded_model():
            trainer.state.model.eval()
            yield
    finally:
        for module, training in modes.items():
            # Not `train()`, which also changes submodules.
            module.training = training
        set_random_state(state)


def _record(run: BenchmarkRun, seconds: float) -> dict[str, Any]:
    result = run.result
    return {
        "benchmark": run.benchmark,
        "score": result.score if result else None,
        "unit": result.unit if result else "",
        "items": len(run.predictions) + len(run.failed),
        "seconds": round(seconds, 2),
        **({"problem": run.problem} if run.problem else {}),
    }
