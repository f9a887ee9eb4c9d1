"""Images and videos that a record names: a file below the image root, a member of its shard, or bytes inside it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vila.core.types import Image, Stored, Video
from vila.data.formats.rows import Row, missing_member
from vila.data.formats.stored import Keys, value_at, written

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "mov", "avi")
_URL_STARTS = ("http://", "https://")
_MEDIUM = "a file name, bytes, or an object with one of bytes, base64, file, path"
_DOWNLOAD = "training reads local files only; download it first"


def safe_path(row: Row, root: Path, name: object, field: str) -> Path:
    """Return `root / name`. Raises DataError if it leaves `root` by `..`, an absolute path or a symbolic link."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise row.fault(field=field, value=name, expected="a file name")
    if name.startswith(_URL_STARTS):
        raise row.fault("is a URL", field=field, value=name, hint=_DOWNLOAD)
    path = root / name
    real, base = os.path.realpath(path), os.path.realpath(root)
    if os.path.commonpath([real, base]) != base:
        raise row.fault(f"leaves the image root {root}", field=field, value=name, hint="move the file or the root")
    return path


def source_of(row: Row, keys: Keys, root: Path, *, base64: bool = False) -> Path | Stored:
    """Return the location of the medium at `keys` of a record. Nothing is opened.

    The value is a file name, bytes, or an object with one of `bytes`, `base64`, `file` (a member of the shard), `path`.
    A name is a member of the row's shard if it has one, else a file below `root`.
    base64: a text that does not end like the file name of an image is base64.
    Raises DataError with file, record, field and value.
    """
    value, field = value_at(row.value, keys), written(keys)
    if isinstance(value, Stored):
        return value
    if isinstance(value, Mapping):
        return _from_object(row, value, keys, root)
    if not isinstance(value, str) or not value:
        raise row.fault(field=field, value=value, expected=_MEDIUM)
    if value.startswith("data:") or (base64 and not _names_a_file(value)):
        return row.stored(keys)
    if row.in_shard:
        return _member(row, value, field)
    return safe_path(row, root, value, field)


def _from_object(row: Row, value: Mapping[str, Any], keys: Keys, root: Path) -> Path | Stored:
    stored = value.get("bytes")
    if isinstance(stored, Stored):
        return stored
    for key in ("bytes", "base64"):
        if value.get(key) is not None:
            if not isinstance(value[key], (str, Stored)):
                raise row.fault(field=written((*keys, key)), value=value[key], expected="base64 text")
            return row.stored((*keys, key))
    if value.get("file") is not None:
        return _member(row, value["file"], written((*keys, "file")))
    if value.get("path") is not None:
        return safe_path(row, root, value["path"], written((*keys, "path")))
    raise row.fault(field=written(keys), value=value, expected=_MEDIUM)


def _member(row: Row, name: object, field: str) -> Stored:
    if not isinstance(name, str):
        raise row.fault(field=field, value=name, expected="the name of a member of the shard")
    if name.lower() in row.members:
        return row.members[name.lower()]
    for stored in row.members.values():
        # A member is also known by its whole name: "shard.tar folder/KEY.0.jpg".
        whole = stored.name.removeprefix(f"{stored.path} ")
        if name in (whole, whole.rpartition("/")[2]):
            return stored
    raise missing_member(row, name, field)


def image_of(row: Row, keys: Keys, root: Path, *, base64: bool = False) -> Image:
    """Return the image at `keys` of a record, unopened. See `source_of`."""
    return Image(source_of(row, keys, root, base64=base64))


def media_keys(row: Row, key: str) -> list[Keys]:
    """Return the keys of the media of a field that holds none (absent, null, empty), one, or a list."""
    value = row.value.get(key)
    if value is None or value == "":
        return []
    return [(key, number) for number in range(len(value))] if isinstance(value, list) else [(key,)]


def images_at(row: Row, key: str, root: Path, *, base64: bool = False) -> tuple[Image, ...]:
    """Return the images of a field that holds none (absent, null, empty), one, or a list. Raises DataError."""
    return tuple(image_of(row, keys, root, base64=base64) for keys in media_keys(row, key))


def only_key(row: Row, names: Sequence[str]) -> str:
    """Return which of several names of one field the record uses, the first of all if none.

    Raises DataError if it uses more than one and their values differ.
    """
    given = [name for name in names if media_keys(row, name)]
    if any(row.value[name] != row.value[given[0]] for name in given[1:]):
        raise row.fault(f"the record has {' and '.join(map(repr, given))}", field=given[1], hint="keep one of them")
    return given[0] if given else names[0]


def member_image(row: Row) -> Image | None:
    """Return the only image among the members of a tar sample, None without one. Raises DataError for several."""
    found = members_with(row, IMAGE_EXTENSIONS)
    if len(found) > 1:
        raise row.fault(f"{len(found)} images ({', '.join(found)}) and no JSON that says which one is meant")
    return Image(row.members[found[0]]) if found else None


def member_video(row: Row, num_frames: int | None = None) -> Video | None:
    """Return the only video among the members of a tar sample, None without one. Raises DataError for several."""
    found = members_with(row, VIDEO_EXTENSIONS)
    if len(found) > 1:
        raise row.fault(f"{len(found)} videos ({', '.join(found)})", expected="one")
    return Video(row.members[found[0]], num_frames) if found else None


def members_with(row: Row, extensions: tuple[str, ...]) -> list[str]:
    """Return the names of the members of a tar sample with one of the extensions, sorted."""
    return sorted(name for name in row.members if name.rpartition(".")[2] in extensions)


def _names_a_file(text: str) -> bool:
    return len(text) < 1024 and text.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
