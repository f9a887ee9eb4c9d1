"""M3IT (arXiv 2306.04387) and FLAN (arXiv 2301.13688), which VILA's stage 3 mixes as VFLAN.

M3IT: questions about images, the training split of 14 of its sets. FLAN: text-only samples, evenly spaced rows of all
its parquet files, taken as one table.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Unpack

from vila.core.errors import ConfigError, DataError, UnknownNameError
from vila.core.progress import Events
from vila.core.reading import read_json
from vila.prepare.merge_shards import StepOptions, prepare_shards
from vila.prepare.pkl import question_sample
from vila.prepare.records import parquet_rows, read_parquet, read_rows
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
        write_units("m3it", own, out, "vflan", _question_samples, events)

    settings = {"step": "m3it", "per_shard": per_shard}
    return prepare_shards(out, "m3it", "vflan", units, settings, convert, per_shard=per_shard, **options)


def _question_samples(unit: str, path: Path, counts: Counts, failures: list[dict[str, Any]]) -> Iterable[TarSample]:
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


ROWS = 1_000_000
"""Number of rows that the released code takes, of about 378 million."""


def prepare_flan(
    sources: Sequence[Path],
    out: Path,
    *,
    rows: int = ROWS,
    per_shard: int = 50_000,
    **options: Unpack[StepOptions],
) -> dict[str, Any] | None:
    """Write `OUT/flan-000000.jsonl` and so on: {"id": "text_flan_00000000", "question", "answer"}.

    sources: all parquet files (columns `inputs`, `targets`) on every worker; they are sorted by path, and worker
             `shard` = (k, n) reads every n-th.
    The released code computes row numbers in float32, which is inexact beyond 16,777,216; here they are exact and
    distinct. Returns the index, or None while other workers are not finished.
    Raises ConfigError if the files have fewer than `rows` rows.
    """
    paths = sorted(sources)
    units = {f"flan-{index:05d}": path for index, path in enumerate(paths)}

    def convert(own: dict[str, Path], events: Events) -> None:
        sizes = [parquet_rows(path) for path in paths]
        total = sum(sizes)
        if not 0 < rows <= total:
            raise ConfigError(field="rows", value=rows, expected=f"1 to {total:,}, the rows of {len(paths)} files")
        starts = dict(zip(units, accumulate(sizes, initial=0), strict=False))

        def samples(unit: str, path: Path, counts: Counts, failures: list[dict[str, Any]]) -> Iterable[Any]:
            return convert_records(_spaced_records(path, starts[unit], total, rows), _text_sample, counts, failures)

        write_units("flan", own, out, "text", samples, events)

    settings = {"step": "flan", "rows": rows, "per_shard": per_shard}
    return prepare_shards(out, "flan", "text", units, settings, convert, per_shard=per_shard, **options)


def spaced_row(index: int, total: int, rows: int) -> int:
    """Return the row of sample `index` if `rows` of `total` rows are taken: exact, increasing, starting at 0.

    >>> [spaced_row(index, 10, 4) for index in range(4)]
    [0, 2, 5, 7]
    """
    return index * total // rows


def first_index(row: int, total: int, rows: int) -> int:
    """Return the first sample whose row is `row` or later: the inverse of `spaced_row`."""
    return -(-row * rows // total)


def _spaced_records(path: Path, start: int, total: int, rows: int) -> Iterator[tuple[int, tuple[int, dict[str, Any]]]]:
    """Yield (row in the file, (sample index, record)) of the rows to take. start: number of the file's first row."""
    index = first_index(start, total, rows)
    for number, record in read_parquet(path, ("inputs", "targets")):
        if index < rows and start + number - 1 == spaced_row(index, total, rows):
            yield number, (index, record)
            index += 1


def _text_sample(_: int, numbered: tuple[int, dict[str, Any]]) -> dict[str, str]:
    index, record = numbered
    question, answer = record["inputs"], record["targets"]
    if not isinstance(question, str) or not isinstance(answer, str) or not question.strip() or not answer.strip():
        raise RecordDroppedError("no question or no answer")
    return {"id": f"text_flan_{index:08d}", "question": question, "answer": answer}
