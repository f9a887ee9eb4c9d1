"""Export targets: protocol, registry, checks, README.md of an export, and `write_export`.

An export is written for another runtime and never read back; formats that are also read are `vila.model.layouts`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vila import __version__
from vila.core.errors import ConfigError, LayoutError, UnknownNameError
from vila.core.files import atomic_path, check_writable, remove_partials, write_json
from vila.core.progress import task
from vila.core.registry import Registry
from vila.export.source import ExportSource

OPTIONS = ("load_awq", "group_size", "tp_size")
"""Options of targets besides the precision; each target supports some of them."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Options of an export.

    precision:  one of the target's `precisions`, "" for the first.
    group_size: inputs that share a scale; 0 for the group size of an INT4 model, or 128.
    tp_size:    number of tensor-parallel ranks that the files are sharded for.
    """

    precision: str = ""
    group_size: int = 0
    tp_size: int = 1


@dataclass(frozen=True, slots=True)
class Readme:
    """Content of the README.md of an export.

    commands: (heading, shell lines) in order; `{out}` is replaced by the name of the directory.
    versions: supported programs and versions, and whether each was run.
    defects:  known defects of the target program, and workarounds in the files.
    notes:    further notes.
    """

    commands: Sequence[tuple[str, str]]
    versions: Sequence[str]
    defects: Sequence[str] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class ExportTarget:
    """A format for another program.

    summary:      what is written and which program reads it, in one line.
    precisions:   supported precisions with a line of help each, the default first.
    verification: how the files were checked, and what was not run.
    problems:     returns every reason why a model is not supported, and the supported values; reads no weights.
    write:        writes the files into an empty directory, tensor by tensor.
    readme:       returns the content of README.md.
    options:      supported ones of OPTIONS.
    has_llm:      whether the weights of the LLM are written.
    """

    name: str
    summary: str
    precisions: Mapping[str, str]
    verification: str
    problems: Callable[[ExportSource, ExportOptions], list[str]]
    write: Callable[[ExportSource, Path, ExportOptions], None]
    readme: Callable[[ExportSource, ExportOptions], Readme]
    options: frozenset[str] = frozenset()
    has_llm: bool = True


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


def resolve_options(target: ExportTarget, options: ExportOptions) -> ExportOptions:
    """Return the options with the default precision of the target. Raises UnknownNameError for an unknown precision."""
    precision = options.precision or next(iter(target.precisions))
    if precision not in target.precisions:
        raise UnknownNameError(f"precision of {target.name}", precision, target.precisions)
    return replace(options, precision=precision)


def check_source(target: ExportTarget, source: ExportSource, options: ExportOptions) -> None:
    """Raise LayoutError with every reason why the target does not support this model."""
    problems = [*_unused_options(target, source, options), *target.problems(source, options)]
    if not problems:
        return
    where = f"cannot be exported as {target.name} ({options.precision})"
    if len(problems) == 1:
        raise LayoutError(f"{where}: {problems[0]}", file=source.folder)
    lines = [f"{where}, for {len(problems)} reasons", *(f"  - {one}" for one in problems)]
    raise LayoutError("\n".join(lines), file=source.folder)


def _unused_options(target: ExportTarget, source: ExportSource, options: ExportOptions) -> Iterator[str]:
    given = {
        "load_awq": source.search is not None,
        "group_size": options.group_size != 0,
        "tp_size": options.tp_size != 1,
    }
    for name in OPTIONS:
        if given[name] and name not in target.options:
            others = [other for other in EXPORTS if name in EXPORTS[other].options]
            yield f"--{name.replace('_', '-')} is only supported by {', '.join(others)}"


def render_readme(target: ExportTarget, source: ExportSource, options: ExportOptions, out: str) -> str:
    """Return the text of README.md. out: name of the directory, used in the commands."""
    readme, config = target.readme(source, options), source.config
    lines = [
        *(f"# {out}", "", f"{target.summary}.", ""),
        f"- Format: `{target.name}`, {options.precision}: {target.precisions[options.precision]}",
        f"- Model: {config.text_config.model_type} with {config.text_config.num_hidden_layers} layers of "
        f"{config.text_config.hidden_size}, a {config.vision_config.model_type} tower and the projector "
        f"{config.projector_type}",
        f"- Chat template: {f'`{config.template}`' if config.template else 'unknown'}",
        *(["- AWQ scales and clipping limits are folded into the weights."] if source.search is not None else []),
        f"- Written by vila {__version__}: `vila export MODEL --format {target.name}`",
        *_section("How to run it", ()),
        "Run these commands in the parent directory:",
    ]
    for heading, text in readme.commands:
        lines += ["", f"{heading}:", "", "```sh", *text.replace("{out}", out).splitlines(), "```"]
    lines += _section("Versions", (*readme.versions, f"Verification of this format: {target.verification}."))
    for title, items in (("Known defects", readme.defects), ("Notes", readme.notes)):
        lines += _section(title, items) if items else []
    return "\n".join(lines) + "\n"


def _section(title: str, items: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *(f"- {item}" for item in items)]


METADATA_FILE = "vila_export.json"
"""Metadata of an export: format and options. `--overwrite` replaces only directories with this file."""


def write_export(
    source: ExportSource, format_name: str, out: Path, options: ExportOptions | None = None, *, overwrite: bool = False
) -> None:
    """Write `source` in a format to the directory `out`, which is complete or absent.

    Raises LayoutError with every reason why the format does not support the model, ConfigError if `out` must not be
    replaced, UnknownNameError for an unknown format or precision; all of them before anything is written.
    """
    target = EXPORTS[format_name]
    options = resolve_options(target, options or ExportOptions())
    check_output(out, source.folder, overwrite, num_bytes=source.min_llm_bytes if target.has_llm else 0)
    check_source(target, source, options)
    metadata = {
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
        write_json(part / METADATA_FILE, metadata)


def check_output(out: Path, source: Path, overwrite: bool, *, num_bytes: int = 0) -> None:
    """Raise ConfigError unless `out` is absent, empty, or an export to overwrite, and does not contain the model.

    First removes partial files of an interrupted export to `out`, and restores a directory that it was replacing.

    num_bytes: disk space that is needed at least.
    """

    def refusal(problem: str, hint: str) -> ConfigError:
        return ConfigError(problem, file=out, field="--output", hint=hint)

    if not os.path.lexists(out):
        check_writable(out, field="--output", is_replaced=True, num_bytes=num_bytes)
    remove_partials(out.parent, out.name)
    here, there = source.resolve(), out.resolve()
    if here == there or there in here.parents:
        raise refusal("contains the model that is exported", "use another directory")
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError("is a file", file=out, field="--output", expected="a directory")
    check_writable(out, field="--output", is_replaced=True, num_bytes=num_bytes)
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise refusal("is not empty", "use another directory, or --overwrite to replace an export")
    if not (out / METADATA_FILE).is_file():
        raise refusal("is not an export, so --overwrite does not replace it", "remove it, or use another directory")


def full_precision_problems(source: ExportSource) -> list[str]:
    """Return why a model lacks full-precision weights of decoder Linears, for formats that quantize themselves."""
    try:
        linears = source.block_linears()
    except UnknownNameError:
        return []
    missing = [name for name in linears if f"{name}.weight" not in source.tensors]
    if not missing:
        return []
    return [
        f"{len(missing)} decoder Linears have no full-precision weight ({', '.join(missing[:3])}) and this format "
        "quantizes by itself; export the original model, with --load-awq to apply the AWQ search"
    ]


GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP = 128


def choose_group_size(source: ExportSource, options: ExportOptions) -> int:
    """Return the group size: of an INT4 model, else of the options, else of the AWQ search, else the largest that fits.

    The largest of 128, 64 and 32 that divides the inputs of all decoder Linears; 128 if none does.
    """
    if source.int4:
        return next(iter(source.int4.values())).group_size
    searched = source.search.settings.get("group_size") if source.search is not None else None
    return options.group_size or searched or _fitting_group(source)


def _fitting_group(source: ExportSource) -> int:
    try:
        linears = source.block_linears()
    except UnknownNameError:
        return DEFAULT_GROUP
    widths = {source.shape(f"{name}.weight")[1] for name in linears if f"{name}.weight" in source.tensors}
    fitting = [size for size in GROUP_SIZES if not any(width % size for width in widths)]
    return max(fitting, default=DEFAULT_GROUP)


def group_size_problems(options: ExportOptions) -> list[str]:
    """Return why a precision without groups does not support a group size."""
    return ["--group-size requires --precision int4"] if options.group_size else []


def int4_problems(
    source: ExportSource,
    options: ExportOptions,
    *,
    symmetric: bool,
    outputs: int,
    groups: tuple[int, ...] = GROUP_SIZES,
) -> list[str]:
    """Return why the decoder Linears cannot be quantized to INT4.

    outputs: required divisor of the outputs of every Linear, for packing.
    groups:  group sizes that the target program supports.
    """
    try:
        linears = source.block_linears()
    except UnknownNameError as error:
        return [f"{error}; families.py lists the Linears that are quantized"]
    names = set(source.names)
    missing = [name for name in linears if f"{name}.weight" not in names]
    if missing:
        return [f"{len(missing)} decoder Linears have no weight ({', '.join(missing[:3])})"]
    return [
        *_group_problems(source, options, linears, groups),
        *_search_problems(source, options, symmetric),
        *_packed_problems(source, options, symmetric),
        *_output_problems(source, linears, outputs),
    ]


def _group_problems(
    source: ExportSource, options: ExportOptions, linears: list[str], groups: tuple[int, ...]
) -> list[str]:
    group = choose_group_size(source, options)
    widths = {source.shape(f"{name}.weight")[1] for name in linears}
    wrong = sorted(width for width in widths if width % group)
    if group in groups and not wrong:
        return []
    fitting = [str(size) for size in groups if not any(width % size for width in widths)]
    remedy = f"use --group-size {' or '.join(fitting)}" if fitting else "no group size of this format does"
    if not wrong:
        return [f"group size {group} is not one of {', '.join(map(str, groups))}; {remedy}"]
    return [f"group size {group} does not divide {', '.join(map(str, wrong))} inputs; {remedy}"]


def _search_problems(source: ExportSource, options: ExportOptions, symmetric: bool) -> list[str]:
    if source.search is None:
        return []
    facts, group = source.search.settings, choose_group_size(source, options)
    out = []
    if facts.get("group_size", group) != group:
        out.append(
            f"the AWQ search is for group size {facts['group_size']}, not {group}; use that size, or search again"
        )
    if facts.get("symmetric", symmetric) != symmetric:
        found, required = ("symmetric", "asymmetric") if facts["symmetric"] else ("asymmetric", "symmetric")
        out.append(f"the AWQ search is for {found} quantization, this format is {required}; search again")
    return out


def _packed_problems(source: ExportSource, options: ExportOptions, symmetric: bool) -> list[str]:
    """Return why the codes of an INT4 model cannot be copied."""
    held = source.int4
    if not held:
        return []
    out, sizes = [], sorted({one.group_size for one in held.values()})
    if len(sizes) > 1:
        out.append(f"the INT4 weights have group sizes {' and '.join(map(str, sizes))}; the format supports one size")
    if options.group_size not in (0, *sizes):
        out.append(f"the INT4 weights have group size {sizes[0]}, not {options.group_size}; omit --group-size")
    if symmetric and source.has_zeros:
        out.append(
            "the INT4 weights have zero points, which this symmetric format cannot store; export the original model, "
            "which is then quantized again, or one that was quantized with --symmetric"
        )
    return out


def _output_problems(source: ExportSource, linears: list[str], outputs: int) -> list[str]:
    counts = {source.shape(f"{name}.weight")[0] for name in linears}
    wrong = sorted(count for count in counts if count % outputs)
    if not wrong:
        return []
    return [f"{', '.join(map(str, wrong))} outputs of a Linear are no multiple of {outputs}; export in 16 bits"]
