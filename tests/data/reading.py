"""A data set of pictures and text on disk, and a reader of it, for tests of loading."""

from __future__ import annotations

import json
from pathlib import Path

from tests import tiny
from vila.core.vision_spec import VisionSpec
from vila.data.dataset import Entry, SampleReader, open_mixture

SPEC = VisionSpec(28, 4, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "pad")


def write_records(folder: Path, records: int = 24) -> Path:
    """`data.jsonl` and its pictures, wider than high; every third record is text alone."""
    rows = []
    for number in range(records):
        answer = {"role": "assistant", "content": "ab" * (number % 5 + 1)}
        content = [{"type": "text", "text": f"q{number}?"}]
        if number % 3 != 2:
            (folder / f"{number}.png").write_bytes(tiny.picture(number, (40, 20)).source)
            content.insert(0, {"type": "image", "path": f"{number}.png"})
        rows.append({"id": f"r{number}", "messages": [{"role": "user", "content": content}, answer]})
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reader_of(*entries: Entry | Path, seed: int = 0) -> SampleReader:
    """A reader with the tiny tokenizer, one id a byte, and four slots a picture."""
    from vila.chat.tokenize import SpanTokenizer

    opened = [entry if isinstance(entry, Entry) else Entry("messages", str(entry)) for entry in entries]
    return SampleReader(open_mixture(opened, seed), "starter_qa", SpanTokenizer(tiny.tokenizer()), SPEC)
