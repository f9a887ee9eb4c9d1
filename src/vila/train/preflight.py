"""Checks of a recipe before data are indexed and weights are read: names, options, paths, packages, ranks."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path

from vila.chat.templates import find_template
from vila.config.schema import MixtureEntry, Recipe
from vila.core.errors import ConfigError, DataError, VilaError
from vila.core.files import check_writable
from vila.core.optional import require
from vila.core.progress import SILENT, Events
from vila.data.dataset import DatasetEntry, build_mixture, open_dataset
from vila.data.formats.base import FORMATS
from vila.data.mixture import Mixture
from vila.data.packing import streams_of_rank
from vila.data.stats import require_images
from vila.model.hub import cached_folder
from vila.model.layouts.detect import LAYOUTS
from vila.train.trackers import require_trackers
from vila.train.train_state import open_initial_model

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NOWHERE = Path(os.devnull) / "nothing"


class Preflight:
    """Collects the problems of a recipe.

    problems: errors, in the order of the recipe's fields.
    absent:   fields whose files are not on this machine, with their paths: problems when the run starts, notes for
              `--dry-run`.
    """

    def __init__(self, recipe: Recipe, ranks: int = 1) -> None:
        """Check everything except data and model, see `check_data` and `check_model`. Only directories are read.

        ranks: number of processes of the run.
        """
        self.recipe = recipe
        self.problems: list[VilaError] = []
        self.absent: dict[str, str] = {}
        self._check_model_paths()
        with self.collected("data.template"):
            if recipe.data.template:
                find_template(recipe.data.template)
        for number, entry in enumerate(recipe.data.mixture):
            self._check_entry(f"data.mixture.{number}", entry)
        with self.collected():
            streams_of_rank(0, ranks, recipe.batch.rows or recipe.batch.samples)
        with self.collected():
            require_packages(recipe)
        with self.collected():
            self._check_output()

    def raise_problems(self, is_note: Callable[[str], bool] = lambda field: False) -> list[str]:
        """Raise all problems as one error; return notes on the absent files of fields for which `is_note` is true.

        Raises a single problem itself; several as one ConfigError with a line for each.
        """
        absent = {field: path for field, path in self.absent.items() if not is_note(field)}
        problems = [
            *self.problems,
            *(ConfigError("no such file or directory", field=field, value=path) for field, path in absent.items()),
        ]
        if len(problems) == 1:
            raise problems[0]
        if problems:
            raise ConfigError.collect(self.recipe.name, map(str, problems))
        return [f"{field}={path} does not exist yet" for field, path in self.absent.items()]

    def check_data(self, events: Events = SILENT) -> None:
        """Open and index the data sets that are on this machine, and check them against the recipe."""
        here = [not any(name.startswith(f"data.mixture.{number}.") for name in self.absent) for number in self._numbers]
        if self.problems:
            return
        parts = []
        for number in (number for number in self._numbers if here[number]):
            with self.collected(f"data.mixture.{number}.path"):
                parts.append(open_dataset(DatasetEntry(**self.recipe.data.mixture[number].model_dump()), events))
        if len(parts) == len(here):
            with self.collected("data.mixture"):
                check_mixture(self.recipe, build_mixture(self.recipe))

    @property
    def _numbers(self) -> range:
        return range(len(self.recipe.data.mixture))

    def check_model(self) -> None:
        """Open the model if it is on this machine, without weights: config, tokenizer, template, tower."""
        source = self.recipe.model
        names = [source.path] if source.path else [source.llm, source.vision]
        if not self.problems and all(cached_folder(name) for name in names):
            with self.collected():
                open_initial_model(self.recipe)

    @contextmanager
    def collected(self, field: str | None = None) -> Iterator[None]:
        """Collect a VilaError of the body as a problem. field: set on errors that have none."""
        try:
            yield
        except VilaError as error:
            error.field = error.field or field
            self.problems.append(error)

    def _check_model_paths(self) -> None:
        for field in ("path", "llm", "vision"):
            name = getattr(self.recipe.model, field)
            if name and not Path(name).expanduser().exists() and not _HUB_ID.fullmatch(name):
                self.absent[f"model.{field}"] = name
        with self.collected("model.template"):
            if self.recipe.model.template:
                find_template(self.recipe.model.template)

    def _check_entry(self, field: str, entry: MixtureEntry) -> None:
        with self.collected(f"{field}.template"):
            if entry.template:
                find_template(entry.template)
        with self.collected(f"{field}.format"):
            format_ = FORMATS[entry.format]
            # Every format checks its options before it opens the path.
            with self.collected(), suppress(DataError):
                try:
                    format_.open(_NOWHERE, _NOWHERE, **entry.options)
                except ConfigError as error:
                    error.field = f"{field}.{error.field or 'options'}"
                    raise
        if not _exists(entry.path):
            self.absent[f"{field}.path"] = entry.path
        if entry.image_root and not Path(entry.image_root).exists():
            self.absent[f"{field}.image_root"] = entry.image_root

    def _check_output(self) -> None:
        output = self.recipe.output
        with self.collected("output.layout"):
            LAYOUTS[output.layout]
        check_writable(output.dir, field="output.dir")


def check_mixture(recipe: Recipe, mixture: Mixture) -> None:
    """Raise ConfigError if an epoch is shorter than a batch, or if the stage needs images and the data have none."""
    batch = recipe.batch.rows or recipe.batch.samples
    if mixture.epoch_length < batch:
        raise ConfigError(
            f"an epoch has {mixture.epoch_length} samples, fewer than the batch",
            field="batch.rows" if recipe.batch.rows else "batch.samples",
            value=batch,
            hint="reduce the batch, or repeat the data",
        )
    if recipe.needs_images:
        require_images(mixture, recipe.needs_images)


def require_packages(recipe: Recipe) -> None:
    """Import the optional packages that a recipe needs. Raises MissingExtraError."""
    require_trackers(recipe)
    if recipe.stage.lora.rank:
        require("peft", "stage.lora", extra="lora")
        if recipe.stage.lora.bits < 16:
            require("bitsandbytes", f"stage.lora.bits={recipe.stage.lora.bits}")


def _exists(path: str) -> bool:
    """Return whether a file or directory exists, or matches a pattern."""
    if Path(path).exists():
        return True
    return any(character in path for character in "*?[") and bool(glob(path))  # noqa: PTH207 the pattern may be absolute
