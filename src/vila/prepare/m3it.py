"""M3IT (arXiv 2306.04387): questions about images; stage 3 of VILA uses the training split of 14 of its sets."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from vila.core.errors import DataError, UnknownNameError
from vila.core.progress import Events
from vila.core.reading import read_json
from vila.prepare.merge_shards import StepOptions, prepare_shards
from vila.prepare.pkl import question_sample
from vila.prepare.records import read_rows
from vila.prepare.shards import TarSample, safe_key
from vila.prepare.work_units import Counts, RecordDroppedError, convert_records, write_units

SETS: dict[str, tuple[str, ...]] = {
    "captioning": ("image-paragraph-captioning", "textcap"),
    "generation": ("multi30k", "visual-dialog"),
    "reasoning": ("clevr", "nlvr", "visual-mrc"),
    "vqa": ("docvqa", "gqa", "ivqa", "ocr-vqa", "st-vqa", "viquae", "vqa-v2"),
}
"""Names of the sets that VILA uses, by task."""


def prepare_m3it(
    sources: Mapping[str, Sequence[Path]], out: Path, *, per_shard: int = 5000, **options: Unpack[StepOptions]
) -> dict[str, Any] | None:
    """Write `OUT/m3it-000000.tar` and so on: `KEY.json` {question, answer, image: ["0.jpg", ...]} and its images.

    sources: files by name of the set (in `SETS`): JSON lines or parquet with `instruction`, `inputs`, `outputs` and
             `image_base64_str` (one or a list). For records without `instruction`, one is drawn from the list in
             `instructions.json` next to the file; the choice depends on set and row only.
    As in the released code, the question is `instruction` + `inputs` without a separator, and the answer is `outputs`.
    Worker `shard` = (k, n) converts every n-th file. Returns the index, or None while other workers are not finished.
    """
    known = [name for names in SETS.values() for name in names]
    units: dict[str, Path] = {}
    for name, paths in sources.items():
        if name not in known:
            raise UnknownNameError("M3IT set", name, known)
        units |= {f"{safe_key(name)}-{index:04d}": path for index, path in enumerate(sorted(paths))}

    def convert(own: dict[str, Path], events: Events) -> None:
        write_units("m3it", own, out, "vflan", _samples, events)

    settings = {"step": "m3it", "per_shard": per_shard}
    return prepare_shards(out, "m3it", "vflan", units, settings, convert, per_shard=per_shard, **options)


def _samples(unit: str, path: Path, counts: Counts, failures: list[dict[str, Any]]) -> Iterable[TarSample]:
    instructions = _instructions(path)

    def sample(row: int, record: dict[str, Any]) -> TarSample:
        instruction = record.get("instruction")
        if not isinstance(instruction, str):
            if not instructions:
                raise RecordDroppedError("no instruction")
            instruction = random.Random(f"{unit}-{row}").choice(instructions)
        inputs = record.get("inputs")
        question = instruction + (inputs if isinstance(inputs, str) else "")
        return question_sample(f"{unit}-{row:07d}", question, record.get("outputs"), record.get("image_base64_str"))

    return convert_records(read_rows(path), sample, counts, failures)


def _instructions(path: Path) -> list[str]:
    file = path.with_name("instructions.json")
    if not file.is_file():
        return []
    listed = read_json(file)
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise DataError(file=file, value=listed, expected="a list of instructions")
    return listed
