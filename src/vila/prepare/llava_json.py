"""LLaVA's JSON lists of conversations: LLaVA-CC3M-Pretrain-595K and ShareGPT4V, without the records that fail checks.

LLaVA-CC3M-Pretrain-595K (arXiv 2304.08485): image captions for aligning the projector in stage 1. ShareGPT4V (arXiv
2311.12793) as VILA uses it: without SA-1B images and without repetitive answers.
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from vila.core.errors import DataError, MediaError
from vila.core.files import atomic_path, sha256_file, write_json, write_jsonl
from vila.core.progress import SILENT, Events, task
from vila.core.reading import file_errors, read_json
from vila.core.types import Image
from vila.data.formats.detect import guess_record
from vila.media.image import open_image
from vila.prepare.merge_shards import read_index
from vila.prepare.records import open_zip, text_problem
from vila.prepare.work_units import Counts, check_settings, locked_output

MARKER = "<image>"
Check = Callable[[dict[str, Any]], str]
"""A record -> "" to keep it, or why it is dropped: the reason to count by, and optionally ": " and details."""


def rewrite_json(
    source: Path, out: Path, name: str, checks: Sequence[Check], settings: dict[str, Any], events: Events = SILENT
) -> dict[str, Any]:
    """Write `OUT/NAME.json` with the records of the JSON list `source` that pass all checks, unchanged and in order.

    Dropped records are listed in `OUT/log/failures.jsonl`: row (from 1), id, reason, detail. Images are not copied.
    Returns the index (`OUT/index.json`); a further call with the same settings reads it.
    """
    with locked_output(out, events=events):
        check_settings(out, settings | {"source_bytes": source.stat().st_size})
        if (out / "index.json").is_file():
            return read_index(out)
        counts, failures = Counts(), list[dict[str, Any]]()
        kept = _kept_records(source, name, checks, counts, failures, events)
        path = out / f"{name}.json"
        write_json(path, kept, indent=None)
        entry = {"file": path.name, "samples": len(kept), "bytes": path.stat().st_size, "sha256": sha256_file(path)}
        index = {"name": name, "kind": "llava_json", "shards": [entry], "counts": counts.as_json()}
        write_jsonl(out / "log" / "failures.jsonl", failures)
        write_json(out / "index.json", index)
        events.log(f"{name}: {counts}")
        return index


def _kept_records(
    source: Path, name: str, checks: Sequence[Check], counts: Counts, failures: list[dict[str, Any]], events: Events
) -> list[Any]:
    records = read_json(source, surrogates=True)
    if not isinstance(records, list):
        hint = f"it looks like {guess_record(records, '.json').text}" if isinstance(records, dict) else None
        raise DataError("not a list of records", file=source, hint=hint)
    kept = []
    with task(events, name, len(records), "records"):
        for row, record in enumerate(records, start=1):
            if problem := _problem(record, checks):
                reason, _, detail = problem.partition(": ")
                counts.dropped[reason] += 1
                identity = record.get("id") if isinstance(record, dict) else None
                identity = None if text_problem(identity) else identity
                failures.append({"row": row, "id": identity, "reason": reason, "detail": detail})
            else:
                kept.append(record)
            events.advanced(name)
    counts.read, counts.written = len(records), len(kept)
    return kept


def _problem(record: Any, checks: Sequence[Check]) -> str:
    if not isinstance(record, dict):
        return "not a record"
    return next((problem for check in (text_problem, *checks) if (problem := check(record))), "")


def conversation_problem(record: dict[str, Any]) -> str:
    """Check that human and gpt alternate, no answer is empty, and there are as many `<image>` markers as images."""
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
    """Return the paths in `image`, which is absent, one path or a list."""
    value = record.get("image") or []
    return [str(one) for one in (value if isinstance(value, list) else [value])]


def image_check(folder: Path, *, decode: bool) -> Check:
    """Return a check that the images of a record are files below `folder` that can, if `decode`, be decoded."""
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


# LLaVA-CC3M-Pretrain-595K

MAX_MEMBER_BYTES = 64 * 2**20
MAX_TOTAL_BYTES = 64 * 2**30


def prepare_llava_align(
    source: Path, images: Path, out: Path, *, decode: bool = False, events: Events = SILENT
) -> dict[str, Any]:
    """Write `OUT/LLaVA-CC3M-Pretrain-595K.json` with the complete records of `chat.json`.

    images: directory of the images, or the published `images.zip`, which is extracted to `OUT/images`.
    decode: also decode every image: about an hour for all 595,375 on one core.
    Returns the index; dropped records and reasons are in `OUT/log/failures.jsonl`.
    """
    folder = unpack_images(images, out / "images", events) if images.suffix.lower() == ".zip" else images
    if not folder.is_dir():
        raise DataError("no such directory", file=folder, hint="give the directory of the images, or images.zip")
    checks = (_has_image, conversation_problem, image_check(folder, decode=decode))
    settings = {"step": "llava_align", "decode": decode, "images": folder.name}
    return rewrite_json(source, out, "LLaVA-CC3M-Pretrain-595K", checks, settings, events)


def unpack_images(archive: Path, folder: Path, events: Events = SILENT) -> Path:
    """Extract a zip archive of images to `folder` atomically. Returns `folder`.

    Raises DataError for damage, for members that point outside the archive, and above MAX_MEMBER_BYTES and
    MAX_TOTAL_BYTES.
    """
    if folder.is_dir():
        return folder
    with open_zip(archive) as opened, atomic_path(folder) as part:
        members = [one for one in opened.infolist() if not one.is_dir()]
        _check_members(archive, members)
        part.mkdir()
        with task(events, f"unpacking {archive.name}", len(members), "files"):
            for member in members:
                with file_errors(archive, record=f"member {member.filename!r}", kind="zip", hint="download it again"):
                    content = opened.read(member)
                target = part / member.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
                events.advanced(f"unpacking {archive.name}")
    return folder


def _check_members(archive: Path, members: list[zipfile.ZipInfo]) -> None:
    # zipfile never reads more of a member than its entry announces, so the announced sizes are checked.
    total = 0
    files: set[PurePosixPath] = set()
    folders: set[PurePosixPath] = set()
    for member in members:
        path, record = PurePosixPath(member.filename), f"member {member.filename!r}"
        if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in member.filename:
            raise DataError("points outside the archive", file=archive, record=record)
        total += member.file_size
        if member.file_size > MAX_MEMBER_BYTES or total > MAX_TOTAL_BYTES:
            raise DataError(
                "archive too large when extracted",
                file=archive,
                record=record,
                value=total,
                expected=f"at most {MAX_MEMBER_BYTES:,} bytes per file and {MAX_TOTAL_BYTES:,} in all",
            )
        if path in files or path in folders or not files.isdisjoint(path.parents):
            raise DataError("occurs twice, or is a file and a folder", file=archive, record=record)
        files.add(path)
        folders.update(path.parents)


def _has_image(record: dict[str, Any]) -> str:
    return "" if len(image_paths(record)) == 1 else "not exactly one image"


# ShareGPT4V

_SENTENCE = re.compile(r"[^.!?\n]+[.!?\n]*")
_RUN_WORDS = 8
_RUN_TIMES = 4
_SENTENCE_WORDS = 4
_SENTENCE_TIMES = 3


def prepare_sharegpt4v(
    source: Path,
    out: Path,
    *,
    images: Path | None = None,
    keep_sam: bool = False,
    decode: bool = False,
    events: Events = SILENT,
) -> dict[str, Any]:
    """Write `OUT/NAME.json` (NAME as `source`) without SA-1B records, repetitive answers and broken conversations.

    images:   root directory of the image paths in the records; None skips the check of images.
    decode:   also decode every image.
    keep_sam: keep SA-1B records, whose images have a separate licence.
    The paper states only that such records were removed (100K -> 96K, 1.2M -> 1.17M); `is_repetitive` is our criterion,
    so the numbers differ. Returns the index; dropped records and reasons are in `OUT/log/failures.jsonl`.
    """
    checks: list[Check] = [] if keep_sam else [_sam]
    checks += [conversation_problem, _repetitive]
    if images is not None:
        checks.append(image_check(images, decode=decode))
    settings = {"step": "sharegpt4v", "keep_sam": keep_sam, "images": images is not None, "decode": decode}
    return rewrite_json(source, out, source.stem, checks, settings, events)


def is_repetitive(text: str) -> bool:
    """Return whether a sentence of at least 4 words occurs 3 times, or a sequence of 8 words 4 times.

    >>> is_repetitive("The sky is blue. " * 3), is_repetitive("The sky is blue. The sea is blue.")
    (True, False)
    """
    words = text.lower().split()
    sentences = Counter(" ".join(one.lower().split()) for one in _SENTENCE.findall(text))
    if any(times >= _SENTENCE_TIMES and len(one.split()) >= _SENTENCE_WORDS for one, times in sentences.items()):
        return True
    runs = Counter(zip(*(words[start:] for start in range(_RUN_WORDS)), strict=False))
    return any(times >= _RUN_TIMES for times in runs.values())


def _sam(record: dict[str, Any]) -> str:
    names = [str(record.get("id", "")), *(PurePosixPath(path).name for path in image_paths(record))]
    return "an SA-1B image" if any(name.startswith("sa_") for name in names) else ""


def _repetitive(record: dict[str, Any]) -> str:
    answers = (turn["value"] for turn in record["conversations"][1::2])
    return "a repetitive answer" if any(is_repetitive(answer) for answer in answers) else ""
