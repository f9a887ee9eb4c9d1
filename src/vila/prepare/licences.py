"""What each data set of the recipes allows, as data, and the text of `data/LICENSE` that is made from it."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, fields
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from vila.core.errors import DataError

_HEAD = """\
Data sets and their licences
============================

This project holds no data set. Its recipes name those below, and its preparation steps fetch them from where they are
published. Each stays under its own licence, and so does what you derive from it, models included. What a picture's
owner allows is not settled by the licence of the collection that names its address.

This is no legal advice. "read" says that the wording was read on the source's own page when this file was written;
"not read" that it is hearsay: ask the source before you rely on it.

Generated from src/vila/prepare/licences.yaml; change that file.
"""


@dataclass(frozen=True, slots=True)
class DataLicence:
    """One data set: where it is from, what its licence is called, and what that forbids."""

    name: str
    used_in: str
    source: str
    licence: str
    forbids: str
    checked: bool
    """Whether the wording was read at the source."""


def data_licences() -> list[DataLicence]:
    """Every data set of the recipes, in the order of the stages. Raises DataError when an entry is not whole."""
    listed: list[dict[str, Any]] = yaml.safe_load(files("vila.prepare").joinpath("licences.yaml").read_text("utf-8"))
    known = {field.name for field in fields(DataLicence)}
    for entry in listed:
        if entry.keys() != known:
            raise DataError(f"licences.yaml: {entry.get('name')!r} has {sorted(entry)}; expected {sorted(known)}")
    return [DataLicence(**entry) for entry in listed]


def licence_text() -> str:
    """The text of `data/LICENSE`."""
    return "\n\n".join([_HEAD, *map(_paragraph, data_licences())]) + "\n"


def _paragraph(entry: DataLicence) -> str:
    rows = {
        "used in": entry.used_in,
        "source": entry.source,
        "licence": f"{entry.licence} ({'read' if entry.checked else 'not read'})",
        "forbids": entry.forbids,
    }
    lines = [f"    {label + ':':<10}{_wrapped(text)}" for label, text in rows.items()]
    return "\n".join([entry.name, *lines])


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 106, subsequent_indent=" " * 14, break_on_hyphens=False, break_long_words=False)


# --- data_licences
# Which of the known licences a data set is under: by what its preparation wrote beside it, else by its path.


KNOWN: dict[str, tuple[str, ...]] = {
    "cc3m": ("LLaVA-CC3M-Pretrain-595K",),
    "mmc4": ("MMC4 and MMC4-core",),
    "coyo": ("COYO-700M",),
    "m3it": ("M3IT",),
    "flan": ("FLAN (Open-Orca/FLAN)",),
    "vflan": ("M3IT", "FLAN (Open-Orca/FLAN)"),
    "sharegpt4v": ("ShareGPT4V",),
    "obelics": ("OBELICS",),
    "cauldron": ("The Cauldron",),
    "finevision": ("FineVision",),
    "easyvqa": ("easy-VQA",),
}
"""Names of licences by a word of the path. VFLAN is what the original calls M3IT and FLAN together."""


def licences_of(path: Path) -> tuple[DataLicence, ...]:
    """The licences of a data file or folder, those of M3IT's sets too; nothing where no word of it is known.

    The name in `index.json`, which preparation leaves in its folder, counts before words of the path: of its last part,
    then of the folder around it.
    """

    names = next((found for text in _names(path) if (found := _known(text))), ())
    # "M3IT" stands for its sets too, which are listed as "M3IT: gqa" and so on.
    return tuple(one for one in data_licences() if one.name.partition(":")[0] in names)


def _names(path: Path) -> list[str]:
    from vila.core.reading import read_json

    prepared = []
    for folder in (path, path.parent):
        file = folder / "index.json"
        if file.is_file() and file != path:
            facts = read_json(file)
            prepared += [str(facts["name"])] if isinstance(facts, dict) and "name" in facts else []
    # Folders further up are homes and disks, whose names say nothing of the data.
    return [*prepared, path.name, path.parent.name]


def _known(text: str) -> tuple[str, ...]:
    """Licences that a word of the text names: "mmc4-core" and "LLaVA-CC3M-Pretrain-595K.json" do."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    pairs = [first + second for first, second in pairwise(words)]
    return next((KNOWN[word] for word in [*words, *pairs] if word in KNOWN), ())
