"""Detection of the dataset format of records, and of text files that are not JSON lines, for error messages."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

Problem = tuple[str, str]
"""Problem and hint."""

_LINES = 20
_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"|[\[\]{}:,]')
_LISTS_OF_RECORDS = frozenset({
    "messages", "conversations", "branches", "texts", "images", "image", "image_info", "videos", "audios", "tools",
})  # fmt: skip
_WRAPPERS = frozenset({
    "data", "rows", "records", "samples", "items", "examples", "instances", "questions", "annotations", "train",
    "validation", "test", "dataset",
})  # fmt: skip
_KEYS_SHOWN = 8


_JSON = (".jsonl", ".json")
EXTENSIONS = {
    "messages": (".parquet", *_JSON), "llava_json": _JSON, "llava_json_v15": _JSON, "mmc4": (".tar", *_JSON),
    "coyo": (".tar", ".parquet"), "webdataset": (".tar",), "vflan": (".tar", ".parquet", *_JSON),
    "flan": (".parquet", *_JSON), "interleaved": (".parquet", *_JSON), "cauldron": (".parquet", *_JSON),
    "video_json": _JSON,
}  # fmt: skip
"""Extensions of the files that each format reads. Of a directory, it reads the files with the first one that occurs."""


class Guess(NamedTuple):
    """Likely format of a file. formats: names of formats that read it, the closest first. text: description."""

    formats: tuple[str, ...]
    text: str

    @property
    def hint(self) -> str:
        """Hint for the error message."""
        if not self.formats:
            return "convert the records to the format messages; docs/formats.md lists all formats"
        return f"use --format {self.formats[0]} (in a recipe: format: {self.formats[0]})"


def json_lines_problem(head: bytes, *, cut: bool) -> Problem | None:
    """Return problem and hint if the first lines of a text are not JSON lines, None if they may be.

    head: first bytes of the file. cut: whether the file is longer.
    """
    lines = [line for line in head.split(b"\n") if line.strip()]
    if not lines:
        return None
    whole = lines[:-1] if cut and not head.endswith(b"\n") else lines
    first = lines[0].strip()
    if first.startswith(b"{"):
        if len(lines) == 1:
            name = _list_member(head, _WRAPPERS.__contains__)
            return _wrapped(name) if name else None
        return _several_lines(head, first, whole)
    if not whole or any(line.lstrip().startswith(b"{") for line in whole[:_LINES]):
        return None
    return _other_text(first, whole[:_LINES])


def _several_lines(head: bytes, first: bytes, whole: list[bytes]) -> Problem | None:
    """Return the problem of an object over several lines, None for one record per line, damaged or not."""
    if len(whole) < 2 or (whole[1].lstrip().startswith(b"{") and first != b"{"):
        return None
    try:
        json.loads(first)
    except RecursionError:
        return None
    except ValueError as error:
        if not isinstance(error, json.JSONDecodeError):
            return None
        if error.pos < len(first.decode(errors="replace")) and not error.msg.startswith("Unterminated"):
            return None
    else:
        return None
    name = _list_member(head, lambda key: key not in _LISTS_OF_RECORDS)
    if name:
        return _wrapped(name)
    return "a JSON object over several lines", "put it in a list ([...]), or on one line (jq -c . FILE)"


def _wrapped(name: str) -> Problem:
    return f"an object with the list of records in {name!r}", f"extract the list: jq .{name} FILE"


def _list_member(head: bytes, wanted: Any) -> str:
    """Return the first key of the top-level object that satisfies `wanted` and has a list of objects as value."""
    tokens = _TOKEN.finditer(head.decode("utf-8", "replace"))
    depth, before, key = 0, "", ""
    for token in (match.group() for match in tokens):
        if token in "[{":
            if token == "{" and depth == 2 and before == "[" and key and wanted(key):
                return key
            depth += 1
        elif token in "]}":
            depth -= 1
        elif token == ":" and depth == 1 and before.startswith('"'):
            key = before[1:-1]
        elif token == "," and depth == 1:
            key = ""
        before = token
    return ""


def _other_text(first: bytes, lines: list[bytes]) -> Problem:
    try:
        text = first.decode()
    except UnicodeDecodeError:
        return "neither text nor a supported file type", "check the file"
    if text.startswith(("---", "%YAML")) or re.match(r"(- )?[\w-]+:( |$)", text):
        return "seems to be YAML, not JSON", "convert the records to JSON lines"
    for name, mark in (("CSV", ","), ("tab-separated text", "\t"), ("CSV", ";")):
        if mark in text and not text.startswith(('"{', "[")) and all(mark.encode() in line for line in lines[:3]):
            return f"seems to be {name}, not JSON", "convert a table with: vila data from-csv"
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return "text, not JSON", "write one JSON object per line, or a list of objects"
    return "JSON lines, but not of objects", "write one object ({...}) per line"


def guess_record(record: Mapping[str, Any], suffix: str) -> Guess:
    """Return the formats that read records with these keys and types of values from a file type.

    suffix: file extension: .tar, .parquet, .json or .jsonl.
    """
    every = tuple(dict.fromkeys(_formats_of(record)))
    names = tuple(name for name in every if suffix in EXTENSIONS[name])
    if names:
        return Guess(names, f"format {' or '.join(map(repr, names[:2]))}")
    if every:
        return Guess((), f"format {every[0]!r}, which reads {' or '.join(EXTENSIONS[every[0]])}, not {suffix}")
    return Guess((), _unread(record))


def _formats_of(record: Mapping[str, Any]) -> Iterator[str]:
    images = _has(record, "image", "images", "image:", "image_base64_str")
    if isinstance(record.get("messages"), list):
        yield from ("messages", "webdataset")
    if isinstance(record.get("conversations"), list) and not _uses(record["conversations"], "role"):
        if record.get("video") is not None:
            yield "video_json"
        yield from ("llava_json", "llava_json_v15", "messages")
    if isinstance(record.get("text_list"), list):
        yield "mmc4"
    if isinstance(record.get("texts"), list):
        yield "cauldron" if _uses(record["texts"], "user", "assistant") else "interleaved"
    if _has(record, "video_id") and _has(record, "q") and _has(record, "a"):
        yield "video_json"
    if _has(record, "question", "instruction") and _has(record, "answer", "answer:", "outputs"):
        if not images and _has(record, "question"):
            yield "flan"
        yield from ("vflan", "webdataset")
    if _has(record, "question", "inputs") and _has(record, "answer", "targets") and not images:
        yield "flan"
    if _has(record, "image") and _has(record, "text", "caption"):
        yield from ("coyo", "webdataset")


def _has(record: Mapping[str, Any], *keys: str) -> bool:
    return any(record.get(key) is not None for key in keys)


def _uses(items: Iterable[Any], *keys: str) -> bool:
    return any(isinstance(item, Mapping) and any(key in item for key in keys) for item in items)


_UNREAD = (
    ({"conversations"}, "ShareGPT with 'role' and 'content'; rename 'conversations' to 'messages'"),
    ({"instruction", "output"}, "Alpaca"),
    ({"chosen", "rejected"}, "preference pairs"),
    ({"prompt", "completion"}, "prompt and completion"),
    ({"prompt", "response"}, "prompt and response"),
    ({"question_id", "text"}, "questions or answers of a benchmark"),
)


def _unread(record: Mapping[str, Any]) -> str:
    for key, value in record.items():
        if key not in _LISTS_OF_RECORDS and isinstance(value, list) and value and isinstance(value[0], Mapping):
            return f"an object with a list of {len(value)} objects in {key!r}, not a record; use the list alone"
    for keys, name in _UNREAD:
        if keys <= record.keys():
            return f"{name}, which no format reads"
    shown = ", ".join(map(repr, list(record)[:_KEYS_SHOWN]))
    return f"records with the keys {shown}, which no format reads" if shown else "empty records"


def guess_members(extensions: Collection[str]) -> Guess:
    """Return the formats that read a tar sample without usable JSON, by the extensions of its other members."""
    if "txt" in extensions and len(extensions) > 1:
        return Guess(("coyo", "webdataset"), "format 'coyo' or 'webdataset'")
    return Guess((), f"samples of members {', '.join(sorted(extensions)[:_KEYS_SHOWN])}, which no format reads")
