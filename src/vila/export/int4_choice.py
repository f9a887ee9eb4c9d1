"""What INT4 files can be made of a model: the group size, and every reason against it, before a weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vila.core.errors import UnknownNameError
from vila.export.target import ExportOptions

if TYPE_CHECKING:
    from vila.export.source import Source

GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP = 128


def group_of(source: Source, options: ExportOptions) -> int:
    """Return the group size: that of an INT4 model, else the option's, else that of the search, else what fits.

    What fits is the largest of 128, 64 and 32 that divides the inputs of all Linears of the decoder; 128 if none does.
    """
    if source.checkpoint.int4:
        return next(iter(source.checkpoint.int4.values())).group_size
    made = source.search.facts.get("group_size") if source.search is not None else None
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
        return [f"{error}; its card in vila/families would name the Linears that INT4 is for"]
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
    facts, group = source.search.facts, group_of(source, options)
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
