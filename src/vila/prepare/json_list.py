"""Conversations in LLaVA's JSON: checked record by record, the good ones written again, the others listed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from vila.core.errors import DataError, MediaError
from vila.core.events import SILENT, Events, task
from vila.core.files import sha256_file, write_json, write_jsonl
from vila.core.reading import read_json
from vila.core.types import Image
from vila.data.formats.guess import guess_record
from vila.media.image import open_image
from vila.prepare.counts import Counts
from vila.prepare.gather import read_index
from vila.prepare.parts import locks_output, same_settings
from vila.prepare.records import text_fault

MARKER = "<image>"
Check = Callable[[dict[str, Any]], str]
"""A record -> why it is left out, or nothing. A colon separates the reason to count by from details."""


@locks_output
def rewrite_json(
    source: Path, out: Path, name: str, checks: Sequence[Check], settings: dict[str, Any], events: Events = SILENT
) -> dict[str, Any]:
    """Write `OUT/NAME.json` with the records of `source` that pass all checks, unchanged and in their order.

    What does not pass is in `OUT/log/failures.jsonl`: row (from 1), id, reason, detail. Pictures stay where they are.
    Returns the index (`OUT/index.json`); a second call with the same settings returns it at once.
    """
    same_settings(out, settings | {"source_bytes": source.stat().st_size})
    if (out / "index.json").is_file():
        return read_index(out)
    records = read_json(source, surrogates=True)
    if not isinstance(records, list):
        hint = f"it looks like {guess_record(records, '.json').text}" if isinstance(records, dict) else None
        raise DataError("not a list of records", file=source, hint=hint)
    counts, kept, failures = Counts(), list[Any](), list[dict[str, Any]]()
    with task(events, name, len(records), "records"):
        for row, record in enumerate(records, start=1):
            counts.read += 1
            fault = _fault(record, checks)
            if fault:
                reason, _, detail = fault.partition(": ")
                counts.dropped[reason] += 1
                identity = record.get("id") if isinstance(record, dict) else None
                identity = None if text_fault(identity) else identity
                failures.append({"row": row, "id": identity, "reason": reason, "detail": detail})
            else:
                counts.written += 1
                kept.append(record)
            events.advanced(name)
    path = out / f"{name}.json"
    write_json(path, kept, indent=None)
    facts = {"file": path.name, "samples": len(kept), "bytes": path.stat().st_size, "sha256": sha256_file(path)}
    index = {"name": name, "kind": "llava_json", "shards": [facts], "counts": counts.as_json()}
    write_jsonl(out / "log" / "failures.jsonl", failures)
    write_json(out / "index.json", index)
    events.said(f"{name}: {counts}")
    return index


def _fault(record: Any, checks: Sequence[Check]) -> str:
    if not isinstance(record, dict):
        return "not a record"
    if fault := text_fault(record):
        return fault
    return next((fault for check in checks if (fault := check(record))), "")


def conversation_fault(record: dict[str, Any]) -> str:
    """Whether the turns are whole: human and gpt in turn, no empty answer, as many markers as images."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return "no conversations"
    speakers = [turn.get("from") for turn in turns]
    if speakers != ["human", "gpt"] * (len(turns) // 2):
        return f"not human and gpt in turn: {speakers[:6]}"
    texts = [turn.get("value") for turn in turns]
    if not all(isinstance(text, str) for text in texts):
        return "a turn without text"
    if not all(text.strip() for text in texts[1::2]):
        return "an empty answer"
    if any(MARKER in text for text in texts[1::2]):
        return "an image in an answer"
    markers = sum(text.count(MARKER) for text in texts)
    images = len(image_paths(record))
    return "" if markers == images else f"markers and images differ: {markers} markers, {images} images"


def image_paths(record: dict[str, Any]) -> list[str]:
    """The paths under `image`, one or a list or none."""
    value = record.get("image") or []
    return [str(one) for one in (value if isinstance(value, list) else [value])]


def image_check(folder: Path, *, decode: bool) -> Check:
    """A check that the images of a record are files below `folder`, and, with `decode`, that they can be read."""
    root = folder.resolve()

    def check(record: dict[str, Any]) -> str:
        for name in image_paths(record):
            path = root / name
            if PurePosixPath(name).is_absolute() or not path.resolve().is_relative_to(root):
                return f"an image outside the folder: {name}"
            if not path.is_file():
                return f"an image is missing: {name}"
            if decode:
                try:
                    open_image(Image(path))
                except MediaError as error:
                    return f"not an image: {error}"
        return ""

    return check
