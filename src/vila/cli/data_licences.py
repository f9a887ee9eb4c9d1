"""Which of the known licences a data set is under: by what its preparation wrote beside it, else by its path."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vila.prepare.licences import DataLicence

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
    from vila.prepare.licences import data_licences

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
