"""A small data set of images and text on disk, and a reader of it."""

from __future__ import annotations

import json
from pathlib import Path

from tests import tiny
from vila.core.vision_spec import VisionSpec
from vila.data.dataset import DatasetEntry, SampleReader, open_mixture

SPEC = VisionSpec(28, 4, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "pad")


def write_records(folder: Path, records: int = 24) -> Path:
    """Write `data.jsonl` and its images of 40 x 20 pixels; every third record has no image."""
    rows = []
    for number in range(records):
        answer = {"role": "assistant", "content": "ab" * (number % 5 + 1)}
        content = [{"type": "text", "text": f"q{number}?"}]
        if number % 3 != 2:
            (folder / f"{number}.png").write_bytes(tiny.image(number, (40, 20)).source)
            content.insert(0, {"type": "image", "path": f"{number}.png"})
        rows.append({"id": f"r{number}", "messages": [{"role": "user", "content": content}, answer]})
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reader_of(*entries: DatasetEntry | Path, seed: int = 0) -> SampleReader:
    """Return a reader with the tiny tokenizer (one id for each byte) and four placeholders for each image."""
    from vila.chat.tokenize import SpanTokenizer

    opened = [entry if isinstance(entry, DatasetEntry) else DatasetEntry("messages", str(entry)) for entry in entries]
    return SampleReader(open_mixture(opened, seed), "starter_qa", SpanTokenizer(tiny.tokenizer()), SPEC)
