"""Files for training tests: a tiny saved model, a few records, and a recipe that trains it in a second."""

from __future__ import annotations

import io
import json
from pathlib import Path

from tests import tiny
from vila.config.load import load_recipe
from vila.config.schema import Recipe
from vila.model.loading import save_model


def write_training_files(folder: Path, family: str = "llama", records: int = 24) -> Path:
    """A model directory and `data.jsonl` with images, branches and text-only records."""
    save_model(*tiny.vila(family), folder / "base")
    rows = []
    for number in range(records):
        question = [
            {"role": "user", "content": f"q{number}?"},
            {"role": "assistant", "content": "ab" * (number % 5 + 1)},
        ]
        if number % 3 == 2:
            rows.append({"id": f"text{number}", "messages": question})
            continue
        name = f"{number}.png"
        (folder / name).write_bytes(tiny.image(number).source)
        image = {"role": "user", "content": [{"type": "image", "path": name}]}
        branches = [question, [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "12"}]]
        rows.append({"id": f"image{number}", "messages": [image], "branches": branches})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tiny_recipe(folder: Path, out: str = "out", *overrides: str) -> Recipe:
    """Stage 3 of the starter on the tiny files, about twelve steps of two packed sequences."""
    return load_recipe(
        "starter/3_sft",
        [
            f"model.path={folder / 'base'}",
            f"data.mixture=[{{format: messages, path: {folder / 'data.jsonl'}}}]",
            "data.max_length=96",
            "data.look_ahead=6",
            "batch.rows=2",
            "batch.micro=1",
            "budget.tokens=2000",
            "stage.lr=5e-3",
            "compute.feature_cache=false",
            "compute.dtype=float32",
            "compute.workers=0",
            "output.checkpoint_every_s=1000",
            f"output.dir={folder / out}",
            *overrides,
        ],
    )


def jpeg_bytes() -> bytes:
    """A small JPEG image."""
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(stream, "JPEG")
    return stream.getvalue()
