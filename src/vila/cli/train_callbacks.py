"""Callbacks of `vila train` from the recipe's `monitor` section, and its checks."""

from __future__ import annotations

from pathlib import Path

from vila.config.schema import Prompt, Recipe
from vila.core.errors import ConfigError
from vila.core.files import cache_dir
from vila.core.progress import SILENT, Events
from vila.eval.benchmark import BENCHMARKS, Benchmark, missing_media
from vila.eval.training_callbacks import EvaluationCallback, PromptCallback
from vila.model.processor import VilaProcessor
from vila.starter.easy_vqa import obtain_easy_vqa
from vila.train.trackers import open_trackers
from vila.train.trainer import TrainerCallback


def check_monitor(recipe: Recipe, events: Events = SILENT, *, fetch: bool = True) -> Benchmark | None:
    """Check `monitor` before weights are read; return the benchmark for evaluation during training.

    fetch: download easy-VQA if it is the benchmark, no directory is given, and it is not in the cache.
    Raises ConfigError for a missing image or directory, DataError for a benchmark that cannot be read,
    UnknownNameError for an unknown benchmark.
    """
    monitor = recipe.monitor
    _check_images(monitor.prompts)
    if not monitor.eval_every_steps:
        return None
    BENCHMARKS[monitor.eval_benchmark]
    if not fetch and not monitor.eval_data and monitor.eval_benchmark == "easy_vqa":
        return None
    return _open(monitor.eval_benchmark, monitor.eval_data, monitor.eval_items, events)


def build_callbacks(
    recipe: Recipe, processor: VilaProcessor, events: Events = SILENT, benchmark: Benchmark | None = None
) -> list[TrainerCallback]:
    """Return the callbacks of `monitor`: prompts, evaluation, and trackers last. Every rank calls it.

    benchmark: result of `check_monitor`; None calls it, with its errors.
    """
    monitor, folder = recipe.monitor, recipe.output.dir
    benchmark = benchmark or check_monitor(recipe, events)
    callbacks: list[TrainerCallback] = []
    if monitor.prompts:
        callbacks.append(PromptCallback(monitor.prompts, monitor.prompt_every_steps, folder, processor, events))
    if benchmark:
        callbacks.append(EvaluationCallback(benchmark, monitor.eval_every_steps, folder, processor, events))
    return [*callbacks, *open_trackers(recipe, folder)]


def _check_images(prompts: tuple[Prompt, ...]) -> None:
    problems = [
        ConfigError("no such file", field=f"monitor.prompts.{number}.image", value=prompt.image)
        for number, prompt in enumerate(prompts)
        if prompt.image and not Path(prompt.image).is_file()
    ]
    if problems:
        raise ConfigError.collect("monitor.prompts", problems)


def _open(name: str, data: str, count: int, events: Events) -> Benchmark:
    """Open the benchmark; easy-VQA is downloaded if no directory is given."""
    opener = BENCHMARKS[name]
    if not data and name != "easy_vqa":
        raise ConfigError(
            f"{name} needs a data directory",
            field="monitor.eval_data",
            value=data,
            expected="a directory",
        )
    benchmark = opener(Path(data) if data else obtain_easy_vqa(cache_dir(), events), count)
    if gone := missing_media(benchmark.items()):
        raise ConfigError(
            f"{len(gone):,} images of {name} are missing, the first is {gone[0]}", field="monitor.eval_data", value=data
        )
    return benchmark
