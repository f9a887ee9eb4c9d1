"""Pictures and clips that a record names: a file below the image root, a member of its shard, or bytes inside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.types import Image, Stored, Video
from vila.data.formats.rows import Row, missing_member
from vila.data.formats.stored import Keys, value_at, written

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "mov", "avi")
_URL_STARTS = ("http://", "https://")


def safe_path(root: Path, name: object, where: str) -> Path:
    """`root / name`, refused when it leaves `root` by `..`, an absolute path or a symbolic link. Raises DataError."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"{where}: picture path {name!r} is not a file name")
    if name.startswith(_URL_STARTS):
        raise DataError(f"{where}: {name!r} is a URL; training reads local files only, download it first")
    path = root / name
    real, base = os.path.realpath(path), os.path.realpath(root)
    if os.path.commonpath([real, base]) != base:
        raise DataError(f"{where}: picture path {name!r} leaves the image root {root}")
    return path


def source_of(row: Row, keys: Keys, root: Path, *, base64: bool = False) -> Path | Stored:
    """Where the medium lies that stands at `keys` of a record. Nothing is opened.

    The value is a file name, bytes, or an object with one of `bytes`, `base64`, `file` (a member of the shard), `path`.
    A name is a member of the row's shard if it has one, else a file below `root`.
    base64: a text that does not end like a picture's file name is base64.
    Raises DataError naming file, row and value.
    """
    value = value_at(row.value, keys)
    where = f"{row.where} {written(keys)}"
    if isinstance(value, Stored):
        return value
    if isinstance(value, Mapping):
        return _from_object(row, value, keys, root, where)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: {_shown(value)} is neither a file name nor bytes")
    if value.startswith("data:") or (base64 and not _names_a_file(value)):
        return row.stored(keys)
    if row.in_shard:
        return _member(row, value)
    return safe_path(root, value, where)


def _from_object(row: Row, value: Mapping[str, Any], keys: Keys, root: Path, where: str) -> Path | Stored:
    stored = value.get("bytes")
    if isinstance(stored, Stored):
        return stored
    for key in ("bytes", "base64"):
        if value.get(key) is not None:
            return row.stored((*keys, key))
    if value.get("file") is not None:
        return _member(row, value["file"])
    if value.get("path") is not None:
        return safe_path(root, value["path"], where)
    raise DataError(f"{where}: has none of bytes, base64, file, path")


def _member(row: Row, name: object) -> Stored:
    if not isinstance(name, str):
        raise DataError(f"{row.where}: member {name!r} is not a file name")
    if name.lower() in row.members:
        return row.members[name.lower()]
    for stored in row.members.values():
        # A member is also known by its whole name: "shard.tar folder/KEY.0.jpg".
        whole = stored.name.removeprefix(f"{stored.path} ")
        if name in (whole, whole.rpartition("/")[2]):
            return stored
    raise missing_member(row, name)


def image_of(row: Row, keys: Keys, root: Path, *, base64: bool = False) -> Image:
    """The picture at `keys` of a record, unopened. See `source_of`."""
    return Image(source_of(row, keys, root, base64=base64))


def images_at(row: Row, key: str, root: Path, *, base64: bool = False) -> tuple[Image, ...]:
    """The pictures of a field that holds none (absent, null, empty), one, or a list. Raises DataError."""
    value = row.value.get(key)
    if value is None or value == "":
        return ()
    if isinstance(value, list):
        return tuple(image_of(row, (key, number), root, base64=base64) for number in range(len(value)))
    return (image_of(row, (key,), root, base64=base64),)


def member_image(row: Row) -> Image | None:
    """The only picture among the members of a tar sample, None without one. Raises DataError for several."""
    found = _members_with(row, IMAGE_EXTENSIONS)
    if len(found) > 1:
        raise DataError(f"{row.where}: {len(found)} pictures ({', '.join(found)}) and no JSON that says which is meant")
    return Image(row.members[found[0]]) if found else None


def member_video(row: Row, num_frames: int | None = None) -> Video | None:
    """The only clip among the members of a tar sample, None without one. Raises DataError for several."""
    found = _members_with(row, VIDEO_EXTENSIONS)
    if len(found) > 1:
        raise DataError(f"{row.where}: {len(found)} clips ({', '.join(found)}), expected one")
    return Video(row.members[found[0]], num_frames) if found else None


def _members_with(row: Row, extensions: tuple[str, ...]) -> list[str]:
    return sorted(name for name in row.members if name.rpartition(".")[2] in extensions)


def _names_a_file(text: str) -> bool:
    return len(text) < 1024 and text.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"
