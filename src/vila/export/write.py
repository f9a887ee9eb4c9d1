"""Writing an export: all is checked first, the directory appears whole or not at all, README.md says how to run it."""

from __future__ import annotations

import os
from pathlib import Path

from vila import __version__
from vila.core.errors import ConfigError
from vila.core.events import task
from vila.core.files import atomic_path, check_writable, remove_partials, write_json
from vila.export.readme import render_readme
from vila.export.source import Source
from vila.export.target import EXPORTS, ExportOptions, check_source, settled

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
        "ranks": options.ranks,
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
        check_writable(out, field="--out", is_replaced=True, num_bytes=num_bytes)
    remove_partials(out.parent, out.name)
    here, there = source.resolve(), out.resolve()
    if here == there or there in here.parents:
        raise ConfigError(f"{out}: holds the model that is exported; give another directory")
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{out}: is a file; an export is a directory, give another name")
    check_writable(out, field="--out", is_replaced=True, num_bytes=num_bytes)
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"{out}: is not empty; give another directory, or --overwrite to replace an export")
    if not (out / FACTS).is_file():
        raise ConfigError(
            f"{out}: not an export, so --overwrite does not touch it; remove it yourself, or give another directory"
        )
