"""ShareGPT4V (arXiv 2311.12793) as VILA uses it: without SA-1B images and without repetitive answers."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from vila.core.progress import SILENT, Events
from vila.prepare.records import Check, conversation_problem, image_check, image_paths, rewrite_json

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
