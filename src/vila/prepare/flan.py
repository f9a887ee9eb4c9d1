"""FLAN (arXiv 2301.13688) as text-only samples: evenly spaced rows of all its parquet files taken as one table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vila.core.errors import ConfigError
from vila.core.progress import SILENT, Events, task
from vila.prepare.merge_shards import merge_shards
from vila.prepare.records import parquet_rows, read_parquet
from vila.prepare.work_units import (
    Counts,
    check_settings,
    inputs_hash,
    is_finished,
    locks_output,
    units_of_worker,
    write_unit,
)

ROWS = 1_000_000
"""As many rows as the original takes, of about 378 million."""


@locks_output
def prepare_flan(
    sources: Sequence[Path],
    out: Path,
    *,
    rows: int = ROWS,
    per_shard: int = 50_000,
    shard: tuple[int, int] = (0, 1),
    keep_parts: bool = True,
    events: Events = SILENT,
) -> dict[str, Any] | None:
    """Write `OUT/flan-000000.jsonl` and so on: {"id": "text_flan_00000000", "question", "answer"}.

    sources: parquet files with `inputs` and `targets`, all of them on every worker, in alphabetical order of their
             paths; worker `shard` = (k, n) reads every n-th. The original computes row numbers in float32, which
             cannot tell neighbours apart beyond 16,777,216; ours are exact and all different.
    Raises ConfigError when there are fewer rows than asked for.
    Returns the index, or None while other workers are not finished.
    """
    paths = sorted(sources)
    units = {f"flan-{index:05d}": path for index, path in enumerate(paths)}
    check_settings(out, {"step": "flan", "rows": rows, "per_shard": per_shard, "inputs": inputs_hash(units)})
    if not (out / "index.json").is_file():
        sizes = [parquet_rows(path) for path in paths]
        total = sum(sizes)
        if not 0 < rows <= total:
            raise ConfigError(f"rows: {rows:,} of {total:,} in {len(paths)} files; expected 1 to {total:,}")
        starts = {unit: sum(sizes[:index]) for index, unit in enumerate(units)}
        own = units_of_worker(units, shard)
        with task(events, "flan", len(own), "files"):
            for unit in own:
                if not is_finished(out, unit):
                    counts, failures = Counts(), list[dict[str, Any]]()
                    samples = _samples(units[unit], starts[unit], total, rows, counts, failures)
                    write_unit(out, unit, "text", samples, counts, failures)
                events.advanced("flan")
    return merge_shards(
        out, "flan", "text", list(units), per_shard=per_shard, shard=shard, keep_parts=keep_parts, events=events
    )


def spaced_row(index: int, total: int, rows: int) -> int:
    """The row of sample `index` when `rows` of `total` rows are taken: exact, increasing, from the first on.

    >>> [spaced_row(index, 10, 4) for index in range(4)]
    [0, 2, 5, 7]
    """
    return index * total // rows


def first_index(row: int, total: int, rows: int) -> int:
    """The first sample whose row is `row` or later: the inverse of `spaced_row`."""
    return -(-row * rows // total)


def _samples(
    path: Path, start: int, total: int, rows: int, counts: Counts, failures: list[dict[str, Any]]
) -> Iterator[dict[str, str]]:
    index = first_index(start, total, rows)
    for number, record in read_parquet(path, ("inputs", "targets")):
        if index >= rows or start + number - 1 != spaced_row(index, total, rows):
            continue
        counts.read += 1
        question, answer = record["inputs"], record["targets"]
        if not isinstance(question, str) or not isinstance(answer, str) or not question.strip() or not answer.strip():
            counts.dropped["no question or no answer"] += 1
            failures.append({"row": number, "reason": "no question or no answer"})
        else:
            counts.written += 1
            yield {"id": f"text_flan_{index:08d}", "question": question, "answer": answer}
        index += 1
