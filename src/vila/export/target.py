"""What an export target is, what can be asked of it, and the table of those that exist. Importing this needs no torch.

A target is written and never read back; what we also read is a layout (`vila.model.layouts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vila.core.errors import LayoutError, UnknownNameError
from vila.core.registry import Registry

if TYPE_CHECKING:
    from vila.export.source import Source

OPTIONS = ("search", "group_size", "ranks")
"""Options that a target may take, by the names of their fields; every target takes a precision."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What the user asks for.

    precision:  one of the target's `precisions`; empty for its first.
    group_size: inputs that share a scale; 0 for the group size of an INT4 model, or 128.
    ranks:      processes of tensor parallelism that the files are cut for.
    """

    precision: str = ""
    group_size: int = 0
    ranks: int = 1


@dataclass(frozen=True, slots=True)
class Guide:
    """What the README.md of an export says.

    commands: pairs of a heading and shell lines, in the order in which they are run; `{out}` stands for the directory.
    versions: programs and versions that the files are made for, each with whether it was run.
    defects:  known faults of the target, and what was done about them.
    notes:    what the reader has to know besides.
    """

    commands: Sequence[tuple[str, str]]
    versions: Sequence[str]
    defects: Sequence[str] = ()
    notes: Sequence[str] = ()


class ExportTarget(Protocol):
    """A format of another program. Its module imports no torch at its top: `vila export --list` answers at once.

    summary:    what is written and which program reads it, in a line.
    precisions: names of the number formats that it can hold, the default first, each with a line of help.
    takes:      those of OPTIONS that mean something to it.
    verified:   how its files were checked, and what was not run.
    holds_llm:  whether the LLM's weights are written.
    """

    name: str
    summary: str
    precisions: Mapping[str, str]
    takes: frozenset[str]
    verified: str
    holds_llm: bool

    def refusals(self, source: Source, options: ExportOptions) -> list[str]:
        """Every reason why this model cannot be written so, each naming what would work; looks at no weight."""

    def write(self, source: Source, part: Path, options: ExportOptions) -> None:
        """Write the files into the empty directory `part`, tensor by tensor. Errors leave nothing behind."""

    def guide(self, source: Source, options: ExportOptions) -> Guide:
        """What README.md says."""


EXPORTS: Registry[ExportTarget] = Registry(
    "export format",
    {
        "safetensors": "vila.export.folded:TARGET",
        "compressed-tensors": "vila.export.compressed_tensors:TARGET",
        "tensorrt-llm": "vila.export.tensorrt_llm:TARGET",
        "tensorrt-llm-legacy": "vila.export.tensorrt_llm_legacy:TARGET",
        "gguf": "vila.export.gguf:TARGET",
        "gguf-text": "vila.export.gguf:TEXT_TARGET",
        "onnx": "vila.export.onnx_vision:TARGET",
        "tinychatengine": "vila.export.tinychatengine:TARGET",
    },
)


def settled(target: ExportTarget, options: ExportOptions) -> ExportOptions:
    """The options with the target's default precision. Raises UnknownNameError for a precision it does not have."""
    precision = options.precision or next(iter(target.precisions))
    if precision not in target.precisions:
        raise UnknownNameError(f"precision of {target.name}", precision, target.precisions)
    return replace(options, precision=precision)


def check_source(target: ExportTarget, source: Source, options: ExportOptions) -> None:
    """Raises LayoutError with every reason why the target cannot hold this model."""
    reasons = [*_untaken(target, source, options), *target.refusals(source, options)]
    if not reasons:
        return
    where = f"{source.folder}: cannot be exported as {target.name} ({options.precision})"
    if len(reasons) == 1:
        raise LayoutError(f"{where}: {reasons[0]}")
    raise LayoutError("\n".join([f"{where}, for {len(reasons)} reasons", *(f"  - {one}" for one in reasons)]))


def _untaken(target: ExportTarget, source: Source, options: ExportOptions) -> Iterator[str]:
    asked = {"search": source.search is not None, "group_size": options.group_size != 0, "ranks": options.ranks != 1}
    for name in OPTIONS:
        if asked[name] and name not in target.takes:
            others = [other for other in EXPORTS if name in EXPORTS[other].takes]
            yield f"--{name.replace('_', '-')} means nothing here; it is for {', '.join(others)}"
