"""Stamps of what a run reads, the data sets and the model that it starts from, kept in its checkpoints.

A run that resumes compares them: with other data the order of samples, the epochs and the schedule are those of another
run, and with another model the frozen weights, the config and the tokenizer are. Images that records name by path are
not compared.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila.config.schema import Recipe
from vila.core.errors import CheckpointError, VilaError
from vila.core.events import SILENT, Events
from vila.data.mixture import Mixture, Source
from vila.data.stamps import FileStamp, compare_files, stamp_files
from vila.model.hub import cached_folder
from vila.model.layouts.protocol import Checkpoint as ModelCheckpoint
from vila.train.resume import refuse_differences

_MODEL_SUFFIXES = (".json", ".safetensors", ".bin", ".pt", ".model", ".txt", ".jinja")


@dataclass(frozen=True, slots=True)
class DataInput:
    """One entry of the mixture: its path, its samples after splits and limits, and its files by name."""

    path: str
    samples: int
    files: dict[str, Path]


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything that a run reads.

    models: files by name, of each of `model.path`, `model.llm` and `model.vision` that is given.
    """

    data: list[DataInput]
    models: dict[str, dict[str, Path]]


def inputs_of(recipe: Recipe, mixture: Mixture, start: ModelCheckpoint) -> Inputs:
    """List the files of a recipe's data and model; nothing is read.

    start: what `open_start` returned.
    A part that is still to be fetched from the hub has no files.
    """
    data = [
        DataInput(entry.path, len(part.source), _by_name(_files_of(part.source), Path(entry.path)))
        for entry, part in zip(recipe.data.mixture, mixture.parts, strict=True)
    ]
    models: dict[str, dict[str, Path]] = {}
    if recipe.model.path:
        weights = {piece.file.path for piece in start.pieces.values()}
        models["model.path"] = _by_name([*_files_in(start.folder), *weights], start.folder)
    else:
        for field, name in (("model.llm", recipe.model.llm), ("model.vision", recipe.model.vision)):
            if folder := cached_folder(name):
                models[field] = _by_name(_files_in(folder), folder)
    return Inputs(data, models)


class InputStamps:
    """The stamps of a run's inputs as `inputs.json` holds them, computed by a thread; call it to wait for them."""

    def __init__(self, inputs: Inputs, known: Mapping[str, Mapping[str, FileStamp]] | None = None) -> None:
        """known: stamps that are computed already, from `refuse_changed_inputs`; without them the work begins now."""
        self._inputs = inputs
        self._stamps: Mapping[str, Mapping[str, FileStamp]] = known or {}
        self._error: VilaError | None = None
        # A daemon: a run that ends by an error does not wait for it.
        self._thread = threading.Thread(target=self._compute, name="stamps", daemon=True)
        self._thread.start()

    def _compute(self) -> None:
        try:
            self._stamps = {
                field: self._stamps[field] if field in self._stamps else stamp_files(files)
                for field, files in _fields(self._inputs).items()
            }
        except VilaError as error:
            self._error = error

    def __call__(self) -> dict[str, Any]:
        """Return the content of `inputs.json`. Raises VilaError naming a file that cannot be read."""
        self._thread.join()
        if self._error:
            raise self._error
        data = [
            {"path": one.path, "samples": one.samples, "files": self._stamps[_data_field(number)]}
            for number, one in enumerate(self._inputs.data)
        ]
        return {"data": data, "model": {field: self._stamps[field] for field in self._inputs.models}}


def refuse_changed_inputs(
    before: Mapping[str, Any], inputs: Inputs, folder: Path, allow: Sequence[str] = (), events: Events = SILENT
) -> dict[str, dict[str, FileStamp]]:
    """Compare inputs with the stamps of a checkpoint; returns the stamps of those that are the same, by field.

    before: content of `inputs.json`.
    allow:  fields, or sections, that may differ, such as `data` or `model.path`; `events` receive a line then.
    Raises RunChangedError with each difference: number of samples, files, their sizes and content.
    """
    samples, stamps = _parsed(before, folder)
    differences: list[tuple[str, str, str]] = []
    known: dict[str, dict[str, FileStamp]] = {}
    for number, one in enumerate(inputs.data):
        field = _data_field(number)
        if field in samples and samples[field] != one.samples:
            differences.append((field, f"{samples[field]:,} samples", f"{one.samples:,} samples"))
    for field, files in _fields(inputs).items():
        if field not in stamps:
            continue
        changes, same = compare_files(stamps[field], files)
        differences += [(field, f"{name}: {was}", now) for name, was, now in changes]
        if not changes:
            known[field] = same
    refuse_differences("the data or the model", differences, folder, allow)
    for field, was, now in differences:
        events.said(f"note: resuming with a change that was allowed: {field}: {was} -> {now}")
    return known


def _parsed(before: Mapping[str, Any], folder: Path) -> tuple[dict[str, int], dict[str, dict[str, FileStamp]]]:
    try:
        samples = {_data_field(number): int(one["samples"]) for number, one in enumerate(before["data"])}
        files = {_data_field(number): one["files"] for number, one in enumerate(before["data"])} | before["model"]
        stamps = {field: {name: _stamp(*values) for name, values in named.items()} for field, named in files.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"not the stamps of a run ({type(error).__name__}: {error})", file=folder / "inputs.json"
        ) from error
    return samples, stamps


def _stamp(size: int, mtime_ns: int, pieces: int, sha256: str) -> FileStamp:
    return FileStamp(int(size), int(mtime_ns), int(pieces), str(sha256))


def _fields(inputs: Inputs) -> dict[str, dict[str, Path]]:
    return {_data_field(number): one.files for number, one in enumerate(inputs.data)} | inputs.models


def _data_field(number: int) -> str:
    return f"data.mixture.{number}.path"


def _files_of(source: Source) -> list[Path]:
    """The data files of a source, or of the one that it is a view of."""
    while not hasattr(source, "files") and hasattr(source, "source"):
        source = source.source
    return list(getattr(source, "files", ()))


def _files_in(folder: Path) -> list[Path]:
    """Configs, tokenizer and weights of a model's directory, those of its parts (`llm/`, ...) among them."""
    if folder.is_file():
        return [folder]
    found = [*folder.glob("*"), *folder.glob("*/*")]
    return [path for path in found if path.is_file() and path.suffix in _MODEL_SUFFIXES and path.name[0] != "."]


def _by_name(files: Sequence[Path], base: Path) -> dict[str, Path]:
    """Files by a name that does not change with the place of `base`, a directory, a file or a pattern."""
    if not base.is_dir():
        base = Path(os.path.commonpath([path.parent for path in files])) if files else base
    return {(path.relative_to(base) if path.is_relative_to(base) else path).as_posix(): path for path in sorted(files)}
