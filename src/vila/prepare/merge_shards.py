"""A preparation step: convert the work units, then merge their files, as uneven as the inputs, into even shards."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict, Unpack

from vila.core.errors import DataError
from vila.core.files import atomic_path, sha256_file, write_json, write_jsonl
from vila.core.progress import SILENT, Events, task
from vila.core.reading import Fields, read_json_object, read_jsonl
from vila.prepare.shards import even_ranges, read_tar, write_tar
from vila.prepare.work_units import (
    Counts,
    Kind,
    check_settings,
    check_unit,
    inputs_hash,
    is_finished,
    locked_output,
    read_unit_record,
    suffix_of,
    unit_path,
    units_of_worker,
)


class StepOptions(TypedDict, total=False):
    """Options that all steps have."""

    shard: tuple[int, int]
    """Worker (k, n), of n workers that share the output directory; default (0, 1)."""
    keep_parts: bool
    """Default True; False deletes `OUT/parts` at the end, which halves the disk usage."""
    events: Events
    """Receives progress and log lines."""


def prepare_shards(
    out: Path,
    name: str,
    kind: Kind,
    units: Mapping[str, Path],
    settings: dict[str, Any],
    convert: Callable[[dict[str, Path], Events], None],
    *,
    per_shard: int,
    **options: Unpack[StepOptions],
) -> dict[str, Any] | None:
    """Lock `out`, check the settings, convert this worker's units, and merge all units into shards.

    units:    input file by unit, the same on every worker.
    settings: must equal those of earlier calls for `out`; the names and sizes of the inputs are added.
    convert:  writes the given units, those of this worker.
    Returns the index, or None while other workers are not finished. Raises ConfigError, DirectoryInUseError.
    """
    shard, events = options.get("shard", (0, 1)), options.get("events", SILENT)
    with locked_output(out, shard, events):
        check_settings(out, settings | {"inputs": inputs_hash(units)})
        if not (out / "index.json").is_file():
            convert({unit: units[unit] for unit in units_of_worker(units, shard)}, events)
        return merge_shards(out, name, kind, list(units), per_shard=per_shard, **options)


def merge_shards(
    out: Path,
    name: str,
    kind: Kind,
    units: Sequence[str],
    *,
    per_shard: int,
    shard: tuple[int, int] = (0, 1),
    keep_parts: bool = True,
    events: Events = SILENT,
) -> dict[str, Any] | None:
    """Write the samples of all `units`, in their order, to `OUT/NAME-000000.tar` (or `.jsonl`) and so on.

    Existing shards are kept, so an interrupted run resumes. Worker `shard` = (k, n) writes every n-th shard; the worker
    that finds all shards written writes `OUT/index.json` and `OUT/log/failures.jsonl`.
    keep_parts: False deletes `OUT/parts` at the end, which halves the disk usage.
    Returns the index, or None while units or shards of other workers are missing.
    """
    if (out / "index.json").is_file():
        return read_index(out)
    if not all(is_finished(out, unit) for unit in units):
        return None
    sizes = [check_unit(out, unit, kind) for unit in units]
    ranges = even_ranges(sum(sizes), per_shard)
    names = [f"{name}-{index:06d}{suffix_of(kind)}" for index in range(len(ranges))]
    own = set(units_of_worker(names, shard))
    with task(events, f"{name}: shards", len(ranges), "shards"):
        for file, (begin, end) in zip(names, ranges, strict=True):
            if file in own and not _shard_record(out, file).is_file():
                _write_shard(out, file, kind, _samples(out, kind, units, sizes, begin, end), end - begin)
            events.advanced(f"{name}: shards")
    if not all(_shard_record(out, file).is_file() for file in names):
        return None
    counts = Counts.total(read_unit_record(out, unit).section("counts") for unit in units)
    events.log(f"{name}: {counts}")
    index = {
        "name": name,
        "kind": kind,
        "shards": [read_json_object(_shard_record(out, file)) for file in names],
        "counts": counts.as_json(),
    }
    write_jsonl(out / "log" / "failures.jsonl", _failures(out, units))
    write_json(out / "index.json", index)
    if keep_parts:
        for journal in (out / "parts").glob("*.spool"):  # of processes killed after their unit was finished
            journal.unlink()
    else:
        shutil.rmtree(out / "parts")
    return index


def read_index(out: Path) -> dict[str, Any]:
    """Read `index.json` of a finished directory. Raises DataError if it is damaged."""
    path = out / "index.json"
    index = read_json_object(path)
    counts = Counts.total([Fields(index, path).section("counts")])
    shards = index.get("shards")
    if not isinstance(shards, list) or not all(isinstance(one, dict) for one in shards):
        raise DataError(file=path, field="shards", value=shards, expected="a list of objects")
    for number, one in enumerate(shards):
        Fields(one, path, f"shards[{number}]").integer("samples", maximum=2**63 - 1)
    return {**index, "counts": counts.as_json()}


def _shard_record(out: Path, file: str) -> Path:
    return out / "parts" / f"{file}.shard.json"


def _write_shard(out: Path, file: str, kind: Kind, samples: Iterator[Any], expected: int) -> None:
    with atomic_path(out / file) as part:
        if kind == "text":
            with part.open("w", encoding="utf-8") as stream:
                written = sum(bool(stream.write(line)) for line in samples)
        else:
            written = write_tar(part, samples)
        if written != expected:
            raise DataError(
                "the work units contain too few samples for this shard",
                file=out / file,
                value=written,
                expected=f"{expected} samples",
                hint=f"delete {out / 'parts'} and run the command again",
            )
        record = {"file": file, "samples": written, "bytes": part.stat().st_size, "sha256": sha256_file(part)}
    write_json(_shard_record(out, file), record)


def _samples(out: Path, kind: Kind, units: Sequence[str], sizes: Sequence[int], begin: int, end: int) -> Iterator[Any]:
    """Yield samples [begin, end) of the concatenated units; units outside the range are not opened."""
    first = 0
    for unit, size in zip(units, sizes, strict=True):
        low, high = max(begin - first, 0), min(end - first, size)
        first += size
        if low >= high:
            continue
        path = unit_path(out, unit, kind)
        if kind == "text":
            with path.open(encoding="utf-8", newline="\n") as stream:
                yield from islice(stream, low, high)
        else:
            yield from islice(read_tar(path), low, high)


def _failures(out: Path, units: Sequence[str]) -> Iterator[dict[str, Any]]:
    for unit in units:
        path = out / "parts" / f"{unit}.failures.jsonl"
        for number, row in read_jsonl(path):
            if not isinstance(row, dict):
                raise DataError(file=path, record=f"line {number}", value=row, expected="an object ({...})")
            yield {"unit": unit, **row}
