"""What an export target is, what can be asked of it, and the table of those that exist. Importing this needs no torch.

A target is written and never read back; what we also read is a layout (`vila.model.layouts`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from vila import __version__
from vila.core.errors import ConfigError, LayoutError, UnknownNameError
from vila.core.files import atomic_path, check_writable, remove_partials, write_json
from vila.core.progress import task
from vila.core.registry import Registry
from vila.export.source import Source

OPTIONS = ("load_awq", "group_size", "tp_size")
"""Options that a target may take, by the names of their fields; every target takes a precision."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What the user asks for.

    precision:  one of the target's `precisions`; empty for its first.
    group_size: inputs that share a scale; 0 for the group size of an INT4 model, or 128.
    tp_size:    processes of tensor parallelism that the files are cut for.
    """

    precision: str = ""
    group_size: int = 0
    tp_size: int = 1


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
        "safetensors": "vila.export.awq_folded:TARGET",
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
    asked = {
        "load_awq": source.search is not None,
        "group_size": options.group_size != 0,
        "tp_size": options.tp_size != 1,
    }
    for name in OPTIONS:
        if asked[name] and name not in target.takes:
            others = [other for other in EXPORTS if name in EXPORTS[other].takes]
            yield f"--{name.replace('_', '-')} means nothing here; it is for {', '.join(others)}"


# --- readme
# The README.md of an export: what it is, how to run it, what is known to work and what is known to be wrong.


def render_readme(target: ExportTarget, source: Source, options: ExportOptions, out: str) -> str:
    """The text. `out` is the directory's name, which commands use."""
    return "\n".join(_lines(target, source, options, out)) + "\n"


def _lines(target: ExportTarget, source: Source, options: ExportOptions, out: str) -> Iterator[str]:
    guide = target.guide(source, options)
    config = source.config
    yield f"# {out}"
    yield ""
    yield f"{target.summary}."
    yield ""
    yield f"- Format: `{target.name}`, {options.precision}: {target.precisions[options.precision]}"
    yield (
        f"- Model: {config.text_config.model_type} with {config.text_config.num_hidden_layers} layers of "
        f"{config.text_config.hidden_size}, a {config.vision_config.model_type} tower and the projector "
        f"{config.projector_type}"
    )
    yield f"- Conversation template: {f'`{config.template}`' if config.template else 'not known'}"
    if source.search is not None:
        yield "- AWQ scales and limits are folded into the weights."
    yield f"- Written by vila {__version__}: `vila export MODEL --format {target.name}`"
    yield from _section("How to run it", ())
    yield "In the directory that holds this one:"
    for heading, lines in guide.commands:
        yield from ("", f"{heading}:", "", "```sh", *lines.replace("{out}", out).splitlines(), "```")
    yield from _section("Versions", (*guide.versions, f"How this format was checked: {target.verified}."))
    if guide.defects:
        yield from _section("Known defects", guide.defects)
    if guide.notes:
        yield from _section("Notes", guide.notes)


def _section(title: str, items: Sequence[str]) -> Iterator[str]:
    yield from ("", f"## {title}", "")
    yield from (f"- {item}" for item in items)


# --- write
# Writing an export: all is checked first, the directory appears whole or not at all, README.md says how to run it.


FACTS = "vila_export.json"
"""Says that a directory is an export, of what, and how it was asked for; `--overwrite` replaces only those."""


def write_export(
    source: Source, format_name: str, out: Path, options: ExportOptions | None = None, *, overwrite: bool = False
) -> None:
    """Write `source` in a format to the directory `out`.

    Raises LayoutError with every reason why the format cannot hold the model, ConfigError when `out` may not be
    replaced, UnknownNameError for a format or precision that does not exist: all of them before anything is written.
    """
    target = EXPORTS[format_name]
    options = settled(target, options or ExportOptions())
    check_out(out, source.folder, overwrite, num_bytes=source.least_llm_bytes if target.holds_llm else 0)
    check_source(target, source, options)
    facts = {
        "format": target.name,
        "precision": options.precision,
        "group_size": options.group_size,
        "ranks": options.tp_size,
        "folded": source.search is not None,
        "vila": __version__,
    }
    with atomic_path(out) as part, task(source.events, "export", source.num_bytes, "bytes"):
        part.mkdir()
        target.write(source, part, options)
        text = render_readme(target, source, options, out.name)
        (part / "README.md").write_text(text, encoding="utf-8")
        write_json(part / FACTS, facts)


def check_out(out: Path, source: Path, overwrite: bool, *, num_bytes: int = 0) -> None:
    """Raise ConfigError unless `out` can be written: absent, empty, or an export to overwrite, apart from the model.

    num_bytes: least space that is needed.

    What a killed writer of `out` left is removed first, and a directory that it was replacing is put back.
    """
    if not os.path.lexists(out):
        check_writable(out, field="--output", is_replaced=True, num_bytes=num_bytes)
    remove_partials(out.parent, out.name)
    here, there = source.resolve(), out.resolve()
    if here == there or there in here.parents:
        raise ConfigError(f"{out}: holds the model that is exported; give another directory")
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{out}: is a file; an export is a directory, give another name")
    check_writable(out, field="--output", is_replaced=True, num_bytes=num_bytes)
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"{out}: is not empty; give another directory, or --overwrite to replace an export")
    if not (out / FACTS).is_file():
        raise ConfigError(
            f"{out}: not an export, so --overwrite does not touch it; remove it yourself, or give another directory"
        )


# --- full_precision
# Formats that round weights themselves need those of the model before any rounding.


def int4_source_refusals(source: Source) -> list[str]:
    """Why a model in INT4 cannot be written: empty when every Linear of its decoder has a weight of its own."""
    try:
        linears = source.block_linears()
    except UnknownNameError:
        return []
    missing = [name for name in linears if f"{name}.weight" not in source.pieces]
    if not missing:
        return []
    return [
        f"{len(missing)} Linears of its decoder have no weight in full precision ({', '.join(missing[:3])}): this "
        "format rounds by itself; export the model that was quantized, with --load-awq for what AWQ found"
    ]


# --- int4_choice
# What INT4 files can be made of a model: the group size, and every reason against it, before a weight is read.


GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP = 128


def group_of(source: Source, options: ExportOptions) -> int:
    """Return the group size: that of an INT4 model, else the option's, else that of the search, else what fits.

    What fits is the largest of 128, 64 and 32 that divides the inputs of all Linears of the decoder; 128 if none does.
    """
    if source.checkpoint.int4:
        return next(iter(source.checkpoint.int4.values())).group_size
    made = source.search.settings.get("group_size") if source.search is not None else None
    return options.group_size or made or _fitting_group(source)


def _fitting_group(source: Source) -> int:
    try:
        linears = source.block_linears()
    except UnknownNameError:
        return DEFAULT_GROUP
    widths = {source.shape(f"{name}.weight")[1] for name in linears if f"{name}.weight" in source.pieces}
    fitting = [size for size in GROUP_SIZES if not any(width % size for width in widths)]
    return max(fitting, default=DEFAULT_GROUP)


def no_group_refusals(options: ExportOptions) -> list[str]:
    """Why a precision without groups of weights takes no group size."""
    return ["--group-size is for --precision int4; leave one of them out"] if options.group_size else []


def int4_refusals(
    source: Source,
    options: ExportOptions,
    *,
    symmetric: bool,
    outputs: int,
    groups: tuple[int, ...] = GROUP_SIZES,
) -> list[str]:
    """Why the Linears of the decoder's blocks cannot be rounded to INT4.

    outputs: what the packing needs the outputs of every Linear to be a multiple of.
    groups:  group sizes that the target's programs know.
    """
    try:
        linears = source.block_linears()
    except UnknownNameError as error:
        return [f"{error}; its entry in vila/families.py would name the Linears that INT4 is for"]
    names = set(source.names)
    missing = [name for name in linears if f"{name}.weight" not in names]
    if missing:
        return [f"{len(missing)} Linears of its decoder have no weight ({', '.join(missing[:3])})"]
    return [
        *_group_reasons(source, options, linears, groups),
        *_search_reasons(source, options, symmetric),
        *_packed_reasons(source, options, symmetric),
        *_odd(source, linears, outputs),
    ]


def _group_reasons(source: Source, options: ExportOptions, linears: list[str], groups: tuple[int, ...]) -> list[str]:
    group = group_of(source, options)
    widths = {source.shape(f"{name}.weight")[1] for name in linears}
    wrong = sorted(width for width in widths if width % group)
    if group in groups and not wrong:
        return []
    fitting = [str(size) for size in groups if not any(width % size for width in widths)]
    remedy = f"--group-size {' or '.join(fitting)} would" if fitting else "no group size of this format does"
    if not wrong:
        return [f"groups of {group} are not among {', '.join(map(str, groups))}; {remedy} work"]
    return [f"groups of {group} do not divide {', '.join(map(str, wrong))} inputs; {remedy}"]


def _search_reasons(source: Source, options: ExportOptions, symmetric: bool) -> list[str]:
    if source.search is None:
        return []
    facts, group = source.search.settings, group_of(source, options)
    out = []
    if facts.get("group_size", group) != group:
        out.append(
            f"the search was made for groups of {facts['group_size']}, not {group}; search again, or ask for those"
        )
    if facts.get("symmetric", symmetric) != symmetric:
        made, wanted = ("symmetric", "asymmetric") if facts["symmetric"] else ("asymmetric", "symmetric")
        out.append(f"the search was made for {made} weights and these are {wanted}; search again for {wanted} ones")
    return out


def _packed_reasons(source: Source, options: ExportOptions, symmetric: bool) -> list[str]:
    """Why the codes of a model that lies in 4 bits cannot be taken over."""
    held = source.checkpoint.int4
    if not held:
        return []
    out, sizes = [], sorted({one.group_size for one in held.values()})
    if len(sizes) > 1:
        out.append(f"its INT4 weights have groups of {' and '.join(map(str, sizes))}; the format knows one size")
    if options.group_size not in (0, *sizes):
        out.append(f"its INT4 weights have groups of {sizes[0]}, not {options.group_size}; leave --group-size out")
    if symmetric and source.has_zeros:
        out.append(
            "its INT4 weights have zero points, which symmetric codes cannot hold; export the model that was "
            "quantized, whose weights are then rounded anew, or one that was quantized with --symmetric"
        )
    return out


def _odd(source: Source, linears: list[str], outputs: int) -> list[str]:
    counts = {source.shape(f"{name}.weight")[0] for name in linears}
    wrong = sorted(count for count in counts if count % outputs)
    if not wrong:
        return []
    return [f"{', '.join(map(str, wrong))} outputs of a Linear are no multiple of {outputs}; export in 16 bits"]
