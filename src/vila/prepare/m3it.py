"""M3IT (arXiv 2306.04387): questions about images, of which stage 3 of VILA uses the training parts of 14 sets."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vila.core.errors import DataError, UnknownNameError
from vila.core.progress import SILENT, Events, task
from vila.core.reading import read_json
from vila.prepare.merge_shards import merge_shards
from vila.prepare.pkl import question_sample
from vila.prepare.records import read_rows
from vila.prepare.shards import TarSample, safe_key
from vila.prepare.work_units import (
    Counts,
    check_settings,
    inputs_hash,
    is_finished,
    locks_output,
    units_of_worker,
    write_unit,
)

SETS: dict[str, tuple[str, ...]] = {
    "captioning": ("image-paragraph-captioning", "textcap"),
    "generation": ("multi30k", "visual-dialog"),
    "reasoning": ("clevr", "nlvr", "visual-mrc"),
    "vqa": ("docvqa", "gqa", "ivqa", "ocr-vqa", "st-vqa", "viquae", "vqa-v2"),
}
"""The sets that the original uses, by task."""


@locks_output
def prepare_m3it(
    sources: Mapping[str, Sequence[Path]],
    out: Path,
    *,
    per_shard: int = 5000,
    shard: tuple[int, int] = (0, 1),
    keep_parts: bool = True,
    events: Events = SILENT,
) -> dict[str, Any] | None:
    """Write `OUT/m3it-000000.tar` and so on: `KEY.json` {question, answer, image: ["0.jpg", ...]} and its pictures.

    sources: files by the set's name in `SETS`, as JSON lines or parquet with `instruction`, `inputs`, `outputs` and
             `image_base64_str` (one or a list). Where the rows of a set lack `instruction`, its `instructions.json`
             beside the file has a list to draw from; the draw depends on set and row alone.
    As in the original the question is instruction and inputs with nothing between, the answer is outputs.
    Worker `shard` = (k, n) does every n-th file. Returns the index, or None while others are not finished.
    """
    known = [name for names in SETS.values() for name in names]
    units: dict[str, Path] = {}
    for name, paths in sources.items():
        if name not in known:
            raise UnknownNameError("M3IT set", name, known)
        units |= {f"{safe_key(name)}-{index:04d}": path for index, path in enumerate(sorted(paths))}
    check_settings(out, {"step": "m3it", "per_shard": per_shard, "inputs": inputs_hash(units)})
    if not (out / "index.json").is_file():
        own = units_of_worker(units, shard)
        with task(events, "m3it", len(own), "files"):
            for unit in own:
                if not is_finished(out, unit):
                    counts, failures = Counts(), list[dict[str, Any]]()
                    write_unit(out, unit, "vflan", _samples(unit, units[unit], counts, failures), counts, failures)
                    events.log(f"{unit}: {counts}")
                events.advanced("m3it")
    return merge_shards(
        out, "m3it", "vflan", list(units), per_shard=per_shard, shard=shard, keep_parts=keep_parts, events=events
    )


def _samples(unit: str, path: Path, counts: Counts, failures: list[dict[str, Any]]) -> Iterator[TarSample]:
    instructions = _instructions(path)
    for row, record in read_rows(path):
        counts.read += 1
        try:
            instruction = record.get("instruction")
            if not isinstance(instruction, str):
                if not instructions:
                    raise DataError("no instruction")
                instruction = random.Random(f"{unit}-{row}").choice(instructions)
            inputs = record.get("inputs")
            question = instruction + (inputs if isinstance(inputs, str) else "")
            sample = question_sample(
                f"{unit}-{row:07d}", question, record.get("outputs"), record.get("image_base64_str")
            )
        except DataError as error:
            reason, _, detail = str(error).partition(": ")
            counts.dropped[reason] += 1
            failures.append({"row": row, "reason": reason, "detail": detail})
            continue
        counts.written += 1
        yield sample


def _instructions(path: Path) -> list[str]:
    file = path.with_name("instructions.json")
    if not file.is_file():
        return []
    listed = read_json(file)
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise DataError(file=file, value=listed, expected="a list of instructions")
    return listed
