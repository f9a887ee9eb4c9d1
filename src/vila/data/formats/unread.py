"""Media of a record under keys that its format does not read, which would be trained on as text alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any

from vila.core.types import Sample, Stored
from vila.data.formats.media import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, members_with
from vila.data.formats.rows import Row

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


def unread_media(row: Row, sample: Sample, reads: Collection[str]) -> list[str]:
    """Return the names of the keys, columns and members of a record that hold media which its sample does not.

    reads: keys of the record that the format reads media from.
    Raises DataError with the first of them if the sample is text alone, and no key in `reads` holds anything either.
    """
    is_text = not sample.media and not any(_holds(row.value.get(key), strict=False) for key in reads)
    # The columns that were not loaded cost a column of a row group to look into, so only the first record does for all.
    found = [name for name, _ in _top_level(row, reads, peek=is_text or row.record == 0)]
    found += [f"member {name}" for name in _members(row, sample, reads)]
    if is_text:
        found += [name for name, _ in _in_turns(row.value, reads)]
    if is_text and found:
        read = ", ".join(map(repr, reads)) or "no media"
        raise row.fault(
            "media under a key that the format does not read, and none under those that it reads",
            field=found[0],
            value=row.value.get(found[0]),
            hint=f"the format reads {read}; rename the key, or remove it if the record is text alone",
        )
    return found


def _top_level(row: Row, reads: Collection[str], peek: bool) -> Iterator[tuple[str, Any]]:
    """Yield keys that hold media and are not in `reads`; peek: look into columns that were not loaded, too."""
    for key, value in row.value.items():
        if key not in reads and _is_media(key, value):
            yield key, value
    for key in row.unloaded if peek else ():
        if key not in reads and _kind_of(key) and _is_media(key, value := row.peek(key)):
            yield key, value


def _in_turns(record: Mapping[str, Any], reads: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Yield the same of the objects in the record: turns, messages, metadata."""
    for key, value in record.items():
        if key in reads:
            continue
        for number, turn in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(turn, Mapping):
                continue
            for name, inner in turn.items():
                if _is_media(name, inner):
                    yield (f"{key}[{number}].{name}" if isinstance(value, list) else f"{key}.{name}"), inner


def _members(row: Row, sample: Sample, reads: Collection[str]) -> Iterator[str]:
    """Yield the media members of a tar sample that neither its sample nor a key in `reads` names."""
    names = members_with(row, (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS))
    if not names:
        return
    used = {item.source for item in sample.media}
    named = {text.lower().rpartition("/")[2] for key in reads for text in _texts(row.value.get(key))}
    for name in names:
        member = row.members[name]
        if member not in used and name not in named and member.name.lower().rpartition("/")[2] not in named:
            yield name


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, Mapping)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def _is_media(key: str, value: Any) -> bool:
    kind = _kind_of(key)
    return bool(kind) and _holds(value, strict=kind != "media")


@lru_cache(maxsize=4096)
def _kind_of(key: str) -> str:
    """Return "media" for a key that is a name of media and nothing else, "file" for one that may name a media file."""
    words = [word.lower() for word in _WORD.findall(key)]
    if len(words) == 1 and words[0] in _NOUNS:
        return "media"
    return "file" if any(word in _NOUNS or word in _FILES for word in words) else ""


def _holds(value: Any, *, strict: bool) -> bool:
    """Whether a value holds media; strict: it must look like it, else any text that is not empty counts."""
    if isinstance(value, Stored):
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
