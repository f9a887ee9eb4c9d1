"""Licences of the data sets that the recipes use, read from `licences.yaml`."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from vila.core.errors import DataError


@dataclass(frozen=True, slots=True)
class DataLicence:
    """Source and licence of one data set, and what the licence forbids."""

    name: str
    used_in: str
    source: str
    licence: str
    forbids: str
    checked: bool
    """Whether the licence was read on the source's own page."""


def data_licences() -> list[DataLicence]:
    """Return the data sets of the recipes, in the order of the stages. Raises DataError for an incomplete entry."""
    listed: list[dict[str, Any]] = yaml.safe_load(files("vila.prepare").joinpath("licences.yaml").read_text("utf-8"))
    known = {field.name for field in fields(DataLicence)}
    for entry in listed:
        if entry.keys() != known:
            raise DataError(
                file="licences.yaml", record=str(entry.get("name")), value=sorted(entry), expected=str(sorted(known))
            )
    return [DataLicence(**entry) for entry in listed]


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
"""Data sets by a word of the path. VFLAN is VILA's name for M3IT and FLAN together."""


def licences_of(path: Path) -> tuple[DataLicence, ...]:
    """Guess the licences of a data file or directory from its name; empty if no word of it is known.

    The name in the `index.json` that `vila data prepare` writes has priority, then the last part of the path, then the
    directory that contains it.
    """
    names = next((found for text in _names(path) if (found := _known(text))), ())
    # "M3IT" includes its sets, which are listed as "M3IT: gqa" and so on.
    return tuple(one for one in data_licences() if one.name.partition(":")[0] in names)


def _names(path: Path) -> list[str]:
    from vila.core.reading import read_json

    prepared = []
    for folder in (path, path.parent):
        file = folder / "index.json"
        if file.is_file() and file != path:
            index = read_json(file)
            prepared += [str(index["name"])] if isinstance(index, dict) and "name" in index else []
    # Directories further up (home, disk) are not named after the data.
    return [*prepared, path.name, path.parent.name]


def _known(text: str) -> tuple[str, ...]:
    """Return the data sets that a word, or two adjacent words, of the text name, as in "mmc4-core"."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    pairs = [first + second for first, second in pairwise(words)]
    return next((KNOWN[word] for word in [*words, *pairs] if word in KNOWN), ())
