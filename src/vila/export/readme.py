"""The README.md of an export: what it is, how to run it, what is known to work and what is known to be wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vila import __version__
from vila.export.target import ExportOptions, ExportTarget

if TYPE_CHECKING:
    from vila.export.source import Source


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
