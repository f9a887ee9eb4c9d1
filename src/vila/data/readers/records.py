"""Records of JSON, tar and parquet files by number, and the media that a record refers to."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from vila.core.errors import MISSING, DataError
from vila.core.progress import SILENT, Events
from vila.core.types import Image, MediaRef, Sample, Video
from vila.data.bad_samples import RecordLocation
from vila.data.readers.index import FileVersion, Index, open_index, read_span
from vila.data.readers.json import parse_record, scan_json
from vila.data.readers.media_refs import Base64Field, FileSlice, Keys, key_path, value_at
from vila.data.readers.parquet import ParquetCell, column_names, read_row, scan_parquet
from vila.data.readers.tar import read_members, scan_tar


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a data file.

    value:   content; empty for a tar sample without JSON.
    file:    data file of the record.
    number:  position in the file, from 0; "key KEY" for a tar sample.
    name:    id of the sample if the record has no `id`.
    members: other files of a tar sample by extension ("0.jpg" for KEY.0.jpg); `in_shard`: whether it is a tar sample.
    stored:  returns a reference to the bytes, or the base64 text, at a key path.
    unloaded: columns of a table that are not in `value`; `peek` reads one of them.
    """

    value: Mapping[str, Any]
    file: Path
    number: int | str
    name: str
    stored: Callable[[Keys], MediaRef]
    members: Mapping[str, FileSlice] = field(default_factory=dict)
    in_shard: bool = False
    unloaded: tuple[str, ...] = ()
    peek: Callable[[str], Any] = lambda column: None

    def error(
        self,
        problem: str = "",
        *,
        field: str | None = None,
        value: Any = MISSING,
        expected: str | None = None,
        hint: str | None = None,
    ) -> DataError:
        """Return an error with file and number of this record. Arguments: see `VilaError`."""
        return DataError(
            problem, file=self.file, record=self.number, field=field, value=value, expected=expected, hint=hint
        )

    def read_text(self, extension: str) -> str:
        """Read the text of a member. Raises DataError if it is missing or not UTF-8."""
        if extension not in self.members:
            raise missing_member(self, extension)
        try:
            return self.members[extension].read().decode()
        except UnicodeDecodeError as error:
            raise self.error(
                f"not UTF-8 text (byte {error.start})", field=f"member {extension}", hint="save it as UTF-8"
            ) from error


def missing_member(record: Record, extension: str, field: str | None = None) -> DataError:
    """Return the error for a member that a record names and the shard does not have."""
    members = ", ".join(sorted(record.members)) or "none"
    return record.error("not a member of the shard", field=field, value=extension, expected=f"one of {members}")


class RecordFile:
    """The records of one file, numbered in their order there."""

    def __init__(self, path: Path, index: Index) -> None:
        self.path, self._index = path, index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> Record:
        """Read record `number`. Raises DataError with file and record."""
        raise NotImplementedError

    def location(self, number: int) -> RecordLocation:
        """Return the file and the number of a record in it."""
        return str(self.path), number


class JsonRecords(RecordFile):
    """Records of a JSON list or of JSON lines."""

    def __init__(self, path: Path, events: Events = SILENT) -> None:
        super().__init__(path, open_index(path, "json", scan_json, events))

    def __getitem__(self, number: int) -> Record:
        """Read record `number`. Raises DataError with file and record."""
        offset, size = self._index[number]
        raw = read_span(self.path, offset, size, self._index.version)
        stored = partial(_base64, FileSlice(self.path, offset, size, str(self.path), self._index.version), number)
        return Record(parse_record(raw, self.path, number), self.path, number, f"{self.path.stem}/{number}", stored)


class TarRecords(RecordFile):
    """Samples of a tar shard: members with the same key."""

    def __init__(self, path: Path, events: Events = SILENT) -> None:
        super().__init__(path, open_index(path, "tar", scan_tar, events))

    def __getitem__(self, number: int) -> Record:
        """Read sample `number`; its `value` is the member `json`, if any. Raises DataError with shard and key."""
        version = self._index.version
        key, found = read_members(self.path, *self._index[number], version)
        record = f"key {key}"
        members = {m.extension: FileSlice(self.path, m.offset, m.size, f"{self.path} {m.name}", version) for m in found}
        text = members.pop("json", None)
        value = {} if text is None else parse_record(text.read(), self.path, record)
        stored = partial(_base64, text or FileSlice(self.path, 0, 0, str(self.path), version), record)
        return Record(value, self.path, record, f"{self.path.stem}/{key}", stored, members, in_shard=True)


class ParquetRecords(RecordFile):
    """Records of a parquet file; only the requested columns are read."""

    def __init__(self, path: Path, columns: tuple[str, ...] = (), events: Events = SILENT) -> None:
        """columns: names of the columns to read, all if empty; missing ones are ignored."""
        super().__init__(path, open_index(path, "parquet", scan_parquet, events))
        table = self._index.table()
        self._length = int(table[:, 1].sum()) if len(table) else 0
        known = column_names(path)
        self._columns = tuple(name for name in known if not columns or name in columns)
        self._unloaded = tuple(name for name in known if name not in self._columns)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> Record:
        """Read record `number`; bytes in it are `ParquetCell`s. Raises DataError with file and record."""
        value = read_row(self.path, number, self._columns, self._index.version)
        stored = partial(_cell, self.path, number, self._index.version)
        name, peek = f"{self.path.stem}/{number}", partial(_column, self.path, number, self._index.version)
        return Record(value, self.path, number, name, stored, unloaded=self._unloaded, peek=peek)


def _base64(text: FileSlice, record: int | str, keys: Keys) -> MediaRef:
    return Base64Field(text.path, text.offset, text.size, keys, record, text.version)


def _cell(path: Path, record: int, version: FileVersion, keys: Keys) -> MediaRef:
    return ParquetCell(path, record, str(keys[0]), keys[1:], version)


def _column(path: Path, record: int, version: FileVersion, column: str) -> Any:
    return read_row(path, record, (column,), version)[column]


def open_records(path: Path, columns: tuple[str, ...] = (), events: Events = SILENT) -> RecordFile:
    """Open the records of a file; its extension decides the type. Raises DataError."""
    if path.suffix == ".tar":
        return TarRecords(path, events)
    if path.suffix == ".parquet":
        return ParquetRecords(path, columns, events)
    return JsonRecords(path, events)


IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "mov", "avi")
_URL_STARTS = ("http://", "https://")
_MEDIUM = "a file name, bytes, or an object with one of bytes, base64, file, path"
_DOWNLOAD = "training reads local files only; download it first"


def safe_path(record: Record, root: Path, name: object, field: str) -> Path:
    """Return `root / name`. Raises DataError if it leaves `root` by `..`, an absolute path or a symbolic link."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise record.error(field=field, value=name, expected="a file name")
    if name.startswith(_URL_STARTS):
        raise record.error("is a URL", field=field, value=name, hint=_DOWNLOAD)
    path = root / name
    real, base = os.path.realpath(path), os.path.realpath(root)
    if os.path.commonpath([real, base]) != base:
        raise record.error(
            "leaves the image root",
            field=field,
            value=name,
            expected=f"a path in {root}",
            hint="move the file or the root",
        )
    return path


def media_source(record: Record, keys: Keys, root: Path, *, base64: bool = False) -> Path | MediaRef:
    """Return path or reference of the image or video at key path `keys` of a record, without opening it.

    The value is a file name, bytes, or an object with one of `bytes`, `base64`, `file` (a member of the shard), `path`.
    In a tar shard a file name is a member, elsewhere a file below `root`.
    base64: whether text without the extension of an image file is base64.
    Raises DataError with file, record, field and value.
    """
    value, field = value_at(record.value, keys), key_path(keys)
    if isinstance(value, MediaRef):
        return value
    if isinstance(value, Mapping):
        return _from_object(record, value, keys, root)
    if not isinstance(value, str) or not value:
        raise record.error(field=field, value=value, expected=_MEDIUM)
    if value.startswith("data:") or (base64 and not _names_a_file(value)):
        return record.stored(keys)
    if record.in_shard:
        return _member(record, value, field)
    return safe_path(record, root, value, field)


def _from_object(record: Record, value: Mapping[str, Any], keys: Keys, root: Path) -> Path | MediaRef:
    stored = value.get("bytes")
    if isinstance(stored, MediaRef):
        return stored
    for key in ("bytes", "base64"):
        if value.get(key) is not None:
            if not isinstance(value[key], (str, MediaRef)):
                raise record.error(field=key_path((*keys, key)), value=value[key], expected="base64 text")
            return record.stored((*keys, key))
    if value.get("file") is not None:
        return _member(record, value["file"], key_path((*keys, "file")))
    if value.get("path") is not None:
        return safe_path(record, root, value["path"], key_path((*keys, "path")))
    raise record.error(field=key_path(keys), value=value, expected=_MEDIUM)


def _member(record: Record, name: object, field: str) -> MediaRef:
    if not isinstance(name, str):
        raise record.error(field=field, value=name, expected="the name of a member of the shard")
    if name.lower() in record.members:
        return record.members[name.lower()]
    for stored in record.members.values():
        # The complete name of a member is accepted too: "shard.tar folder/KEY.0.jpg".
        whole = stored.name.removeprefix(f"{stored.path} ")
        if name in (whole, whole.rpartition("/")[2]):
            return stored
    raise missing_member(record, name, field)


def image_at(record: Record, keys: Keys, root: Path, *, base64: bool = False) -> Image:
    """Return a reference to the image at `keys` of a record; see `media_source`."""
    return Image(media_source(record, keys, root, base64=base64))


def media_keys(record: Record, key: str) -> list[Keys]:
    """Return the key paths of the media of a field: none (absent, null, empty), one, or those of a list."""
    value = record.value.get(key)
    if value is None or value == "":
        return []
    return [(key, number) for number in range(len(value))] if isinstance(value, list) else [(key,)]


def images_at(record: Record, key: str, root: Path, *, base64: bool = False) -> tuple[Image, ...]:
    """Return references to the images of a field; see `media_keys` and `media_source`."""
    return tuple(image_at(record, keys, root, base64=base64) for keys in media_keys(record, key))


def only_key(record: Record, names: Sequence[str]) -> str:
    """Return which of several alternative names of a field the record uses, the first name if none.

    Raises DataError if it uses several and their values differ.
    """
    given = [name for name in names if media_keys(record, name)]
    if any(record.value[name] != record.value[given[0]] for name in given[1:]):
        raise record.error(
            f"the record has {' and '.join(map(repr, given))} with different values", field=given[1], hint="keep one"
        )
    return given[0] if given else names[0]


def member_image(record: Record) -> Image | None:
    """Return the only image member of a tar sample, None without one. Raises DataError if there are several."""
    found = members_with(record, IMAGE_EXTENSIONS)
    if len(found) > 1:
        raise record.error("several images, and no JSON that names one", value=found)
    return Image(record.members[found[0]]) if found else None


def member_video(record: Record, num_frames: int | None = None) -> Video | None:
    """Return the only video member of a tar sample, None without one. Raises DataError if there are several."""
    found = members_with(record, VIDEO_EXTENSIONS)
    if len(found) > 1:
        raise record.error("several videos", value=found, expected="one")
    return Video(record.members[found[0]], num_frames) if found else None


def members_with(record: Record, extensions: tuple[str, ...]) -> list[str]:
    """Return the members of a tar sample with one of the extensions, sorted by name."""
    return sorted(name for name in record.members if name.rpartition(".")[2] in extensions)


def _names_a_file(text: str) -> bool:
    return len(text) < 1024 and text.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


# Detection of media under keys that a format does not read: without it such a record would be trained on as text alone.

_NOUNS = frozenset(
    word + plural
    for word in ("image", "img", "picture", "pic", "photo", "video", "clip", "frame", "audio", *IMAGE_EXTENSIONS)
    for plural in ("", "s")
)
_FILES = frozenset(("file", "files", "filename", "filenames", "path", "paths"))
_EXTENSIONS = frozenset((*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS))
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
_SHORTEST_BASE64 = 64
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}")


def unread_media(record: Record, sample: Sample, reads: Collection[str]) -> list[str]:
    """Return the keys, columns and members of a record that hold media which are not in its sample.

    reads: keys that the format reads media from.
    Raises DataError with the first of them if the sample has no media and no key in `reads` has a value.
    """
    is_text = not sample.media and not any(_holds(record.value.get(key), strict=False) for key in reads)
    # Checking an unloaded column decodes it for a whole row group, so only the first record of a file does it.
    found = list(_top_level(record, reads, peek=is_text or record.number == 0))
    found += [f"member {name}" for name in _members(record, sample, reads)]
    if is_text:
        found += _nested(record.value, reads)
    if is_text and found:
        read = ", ".join(map(repr, reads)) or "no media"
        problem = "has media that the format does not read, and none that it reads"
        hint = f"the format reads {read}; rename the key, or remove it if the record has no media"
        raise record.error(problem, field=found[0], value=record.value.get(found[0]), hint=hint)
    return found


def _top_level(record: Record, reads: Collection[str], peek: bool) -> Iterator[str]:
    """Yield top-level keys that hold media and are not in `reads`. peek: check unloaded columns too."""
    for key, value in record.value.items():
        if key not in reads and _is_media(key, value):
            yield key
    for key in record.unloaded if peek else ():
        if key not in reads and _key_type(key) and _is_media(key, record.peek(key)):
            yield key


def _nested(record: Mapping[str, Any], reads: Collection[str]) -> Iterator[str]:
    """Yield the same for nested objects: turns, messages, metadata."""
    for key, value in record.items():
        if key in reads:
            continue
        for number, turn in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(turn, Mapping):
                continue
            for name, inner in turn.items():
                if _is_media(name, inner):
                    yield f"{key}[{number}].{name}" if isinstance(value, list) else f"{key}.{name}"


def _members(record: Record, sample: Sample, reads: Collection[str]) -> Iterator[str]:
    """Yield the media members of a tar sample that neither its sample nor a key in `reads` refers to."""
    names = members_with(record, (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS))
    if not names:
        return
    used = {item.source for item in sample.media}
    named = {text.lower().rpartition("/")[2] for key in reads for text in _texts(record.value.get(key))}
    for name in names:
        member = record.members[name]
        if member not in used and name not in named and member.name.lower().rpartition("/")[2] not in named:
            yield name


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, Mapping)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def _is_media(key: str, value: Any) -> bool:
    key_type = _key_type(key)
    return bool(key_type) and _holds(value, strict=key_type != "media")


@lru_cache(maxsize=4096)
def _key_type(key: str) -> str:
    """Return "media" for a key that names media ("image"), "file" for one that may name a media file, else ""."""
    words = [word.lower() for word in _WORD.findall(key)]
    if len(words) == 1 and words[0] in _NOUNS:
        return "media"
    return "file" if any(word in _NOUNS or word in _FILES for word in words) else ""


def _holds(value: Any, *, strict: bool) -> bool:
    """Return whether a value holds media. strict: text must look like media; else any non-empty text counts."""
    if isinstance(value, MediaRef):
        return True
    if isinstance(value, str):
        return bool(value) and (not strict or _looks_like_media(value))
    if isinstance(value, Mapping):
        return any(_holds(inner, strict=strict) for inner in value.values())
    return isinstance(value, list) and any(_holds(inner, strict=strict) for inner in value)


def _looks_like_media(text: str) -> bool:
    if text.startswith(("data:image/", "data:video/")):
        return True
    if len(text) < 1024 and text.partition("?")[0].rpartition(".")[2].lower() in _EXTENSIONS:
        return True
    return len(text) >= _SHORTEST_BASE64 and _BASE64.fullmatch(text) is not None and " " not in text
