"""Update the generated parts of the documentation pages (tables of fields, recipes, formats, options) and data/LICENSE.

    python scripts/make_docs.py

A part is enclosed by the comments `<!-- generated: NAME -->` and `<!-- end: NAME -->`; the rest of a page is written by
hand and is not changed. `tests/package/test_docs.py` fails if a part is out of date. Needs no torch.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path
from types import FunctionType
from typing import Any

import typer
import typer.main

from vila.chat import templates as chat_templates
from vila.chat.render import render
from vila.chat.template import Span, Template
from vila.chat.templates import ALIASES, TEMPLATES
from vila.cli.main import app
from vila.config import Recipe, load_recipe, recipe_names
from vila.config.field_docs import describe_fields
from vila.core.registry import Registry
from vila.core.types import Image, Message
from vila.data.formats.base import FORMATS
from vila.eval.benchmark import BENCHMARKS
from vila.export.base import EXPORTS, OPTIONS
from vila.prepare.licences import data_licences

ROOT = Path(__file__).resolve().parents[1]
LICENCES = ROOT / "data" / "LICENSE"
PART = re.compile(r"<!-- generated: (?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- end: (?P=name) -->", re.DOTALL)

# Example conversation, as in tests/chat/test_render.py.
TWO_TURNS = (
    Message.of("user", Image("cat.png"), "\nWhat?"),
    Message.of("assistant", "A cat."),
    Message.of("user", "Why?"),
    Message.of("assistant", "Fur."),
)


def main() -> int:
    """Update every page with generated parts, and data/LICENSE; print which of them changed."""
    for page in [*pages(), LICENCES]:
        text = page.read_text(encoding="utf-8")
        fresh = licence_text(text) if page == LICENCES else regenerated(text)
        if fresh != text:
            page.write_text(fresh, encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: {'written' if fresh != text else 'up to date'}")
    return 0


def pages() -> list[Path]:
    """Return the pages with generated parts."""
    return [page for page in sorted((ROOT / "docs").rglob("*.md")) if PART.search(page.read_text(encoding="utf-8"))]


def part_names(text: str) -> list[str]:
    """Return the names of the generated parts of a page, in reading order."""
    return [match["name"] for match in PART.finditer(text)]


def regenerated(text: str) -> str:
    """Return the page with its generated parts updated. Raises ValueError for unknown parts."""
    return PART.sub(_regenerated_part, text)


def _regenerated_part(match: re.Match[str]) -> str:
    name = match["name"]
    if name not in PARTS:
        raise ValueError(f"generated part {name!r} is unknown; known are {', '.join(PARTS)}")
    return f"<!-- generated: {name} -->\n\n{PARTS[name]()}\n\n<!-- end: {name} -->"


def licence_text(text: str) -> str:
    """Return data/LICENSE with its list of data sets updated; its head is written by hand."""
    mark = "Generated from src/vila/prepare/licences.yaml; edit that file.\n"
    head, _, _ = text.partition(mark)
    parts = [f"{head}{mark}"]
    for entry in data_licences():
        licence = f"{entry.licence} ({'read' if entry.checked else 'not read'})"
        rows = {"used in": entry.used_in, "source": entry.source, "licence": licence, "forbids": entry.forbids}
        lines = [entry.name]
        for label, value in rows.items():
            wrapped = textwrap.fill(
                value, 106, subsequent_indent=" " * 14, break_on_hyphens=False, break_long_words=False
            )
            lines.append(f"    {label + ':':<10}{wrapped}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def recipe_fields() -> str:
    """Table of all recipe fields: accepted values, default, description."""
    shown = {"required": "required", "()": "`[]`"}
    rows = [
        (f"`{path}`", accepts, shown.get(default, f"`{default}`"), text)
        for path, accepts, default, text in describe_fields()
    ]
    return table(("Field", "Accepts", "Default", "Description"), rows)


def packaged_recipes() -> str:
    """Table of the packaged recipes: first comment line and main settings."""
    folder = Path(str(resources.files("vila.config"))) / "recipes"
    rows = []
    for name in recipe_names():
        about = (folder / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
        rows.append((f"`{name}`", about.removeprefix("# "), *_recipe_cells(load_recipe(name))))
    return table(("Recipe", "Description", "Trains", "Peak lr", "Batch", "Max length", "Budget", "Formats"), rows)


def _recipe_cells(recipe: Recipe) -> tuple[str, ...]:
    stage, data, budget = recipe.stage, recipe.data, recipe.budget
    rate = f"{stage.lr:g}"
    if stage.lr_projector not in (None, stage.lr):
        rate += f", projector {stage.lr_projector:g}"
    unit = "sequence" if data.packing == "rows" else "sample"
    formats = dict.fromkeys(entry.format for entry in data.mixture)
    return (
        ", ".join(stage.tune),
        rate,
        _count(recipe.batch.rows or recipe.batch.samples, unit),
        f"{data.max_length:,}",
        _count(budget.tokens, "token") if budget.tokens else _count(budget.epochs, "epoch"),
        ", ".join(formats),
    )


def _count(number: float, unit: str) -> str:
    written = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{written} {unit}{'s' * (number != 1)}"


def templates() -> str:
    """List of all templates: names, stop strings, and the rendered example."""
    return "\n".join(
        ["```text", *(line for template in TEMPLATES.values() for line in _template_lines(template)), "```"]
    )


def _template_lines(template: Template) -> list[str]:
    names = [template.name, *(alias for alias, name in ALIASES.items() if name == template.name)]
    stops = ", ".join(map(json.dumps, ["{eos}", *template.stop]))
    text = _marked(render(TWO_TURNS, template))
    for name, long in (("{system}", template.system), ("{example}", _EXAMPLE)):
        text = text.replace(long, name) if long else text
    return [f"{', '.join(names):<40} ends at {stops}", f"    {json.dumps(text)}"]


def _marked(spans: Sequence[Span]) -> str:
    """Return the text with a "~" wherever supervision starts or ends."""
    groups = groupby(spans, key=lambda span: span.train)
    texts = [(train, "".join(map(_written, group))) for train, group in groups]
    return "".join(f"~{text}~" if train else text for train, text in texts)


def _written(span: Span) -> str:
    return "<image>" if span.media else span.text


_EXAMPLE = f"Human: {chat_templates.V0_QUESTION}###Assistant: {chat_templates.V0_ANSWER}"


def cli_reference() -> str:
    """Reference of all commands, with arguments and options."""
    lines: list[str] = []
    for path, command in _commands(typer.main.get_command(app), ("vila",)):
        arguments = [part for part in command.params if part.param_type_name == "argument"]
        options = [part for part in command.params if part.param_type_name == "option" and not part.hidden]
        usage = " ".join([*path, *(_usage_name(part) for part in arguments), *(["[OPTIONS]"] if options else [])])
        help_text = re.sub(r"\[/?bold\]", "", " ".join((command.help or "").split()))
        lines += [f"## {' '.join(path)}", "", help_text, "", "```text", usage, "```", ""]
        rows = [(f"`{_usage_name(part)}`", "", _help(part)) for part in arguments]
        rows += [(_option_names(part), _default(part), _help(part)) for part in options]
        if rows:
            lines += [table(("Argument or option", "Default", "Description"), rows), ""]
    return "\n".join(lines).rstrip()


def _commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, child in command.commands.items():
        yield from _commands(child, (*path, name))


def _usage_name(part: Any) -> str:
    name = part.metavar or getattr(part, "display_name_raw", None) or part.name
    name = name.upper() if name == part.name else name
    return f"{name}{'...' if part.nargs == -1 and not name.endswith('...') else ''}"


def _option_names(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in sorted((*option.opts, *option.secondary_opts), key=len))
    return names if option.is_flag else f"{names} `{_usage_name(option)}`"


def _default(option: Any) -> str:
    default = option.default
    if option.is_flag or default in (None, "", ()) or callable(default):
        return ""
    return f"`{getattr(default, 'value', default)}`"


def _help(part: Any) -> str:
    return " ".join((part.help or "").split())


def registered(registry: Registry[object]) -> str:
    """Table of a registry: names, summaries or first lines of docstrings, and modules."""
    rows = [(f"`{name}`", _summary(registry[name]), f"`{_source(registry.module(name))}`") for name in registry]
    return table(("Name", "Description", "File"), rows)


def _summary(entry: object) -> str:
    owner = entry if isinstance(entry, (type, FunctionType)) else type(entry)
    return getattr(entry, "summary", None) or (owner.__doc__ or "").partition("\n")[0]


def _source(module: str) -> str:
    return f"src/{module.replace('.', '/')}.py"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; bars in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def export_formats() -> str:
    """Table of export formats: precisions, description, options, verification."""
    rows = []
    for name in EXPORTS:
        target = EXPORTS[name]
        options = [f"`--{option.replace('_', '-')}`" for option in OPTIONS if option in target.options]
        precisions = ", ".join(f"`{precision}`" for precision in target.precisions)
        rows.append((f"`{name}`", precisions, target.summary, ", ".join(options), target.verification))
    return table(("Format", "Precisions", "Description", "Options", "Verified"), rows)


PARTS: dict[str, Callable[[], str]] = {
    "recipe-fields": recipe_fields,
    "packaged-recipes": packaged_recipes,
    "templates": templates,
    "dataset-formats": lambda: registered(FORMATS),
    "benchmarks": lambda: registered(BENCHMARKS),
    "export-formats": export_formats,
    "cli": cli_reference,
}


if __name__ == "__main__":
    sys.exit(main())
