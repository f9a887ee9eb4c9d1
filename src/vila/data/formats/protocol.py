"""What a dataset format does, and the table of those that exist."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from vila.core.errors import DataError
from vila.core.registry import Registry
from vila.data.mixture import Source


class DatasetFormat(Protocol):
    """Opens files of one kind."""

    def open(self, path: Path, image_root: Path) -> Source:
        """Random access to samples. Raises DataError naming file, row and reason for what cannot become one."""


FORMATS: Registry[DatasetFormat] = Registry(
    "dataset format",
    {
        "messages": "vila.data.formats.messages:FORMAT",
        "llava_json": "vila.data.formats.llava_json:FORMAT",
    },
)


def safe_path(root: Path, name: object, where: str) -> Path:
    """`root / name`, refused when it leaves `root` by `..`, an absolute path or a symbolic link. Raises DataError."""
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: picture path {name!r} is not a file name")
    path = root / name
    real, base = os.path.realpath(path), os.path.realpath(root)
    if os.path.commonpath([real, base]) != base:
        raise DataError(f"{where}: picture path {name!r} leaves the image root {root}")
    return path
