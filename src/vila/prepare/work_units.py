"""Work units of a preparation step: one input file each, converted to one file of samples in `OUT/parts/`.

UNIT.tar or UNIT.jsonl   the samples
UNIT.failures.jsonl      failed downloads and dropped records, one per line: {"url" or "row", "reason", ...}
UNIT.part.json           the unit record (samples, bytes, sha256, counts), written last: the unit is finished

An interrupted step resumes with the units that are not finished. Units are assigned to workers by their position.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from vila.core.errors import MISSING, ConfigError, DataError
from vila.core.files import DirectoryLock, atomic_path, remove_partials, sha256_file, write_json, write_jsonl
from vila.core.progress import SILENT, Events, task
from vila.core.reading import Fields, read_json_object
from vila.prepare.shards import safe_key, write_tar

T = TypeVar("T")

Kind = Literal["mmc4", "pairs", "vflan", "text"]
"""Kind of samples. mmc4: documents; pairs: image and text; vflan: question, answer, images; text: JSON lines."""
_MAX = 2**63 - 1


@dataclass(slots=True)
class Counts:
    """Numbers of records: `read` = `written` + sum of `dropped`; `noted` counts events of records that were kept."""

    read: int = 0
    written: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        """Return the stored form, reasons in alphabetical order."""
        return {
            "in": self.read,
            "out": self.written,
            "dropped": dict(sorted(self.dropped.items())),
            "noted": dict(sorted(self.noted.items())),
        }

    @staticmethod
    def total(stored: Iterable[Fields]) -> Counts:
        """Sum stored counts. Raises the error type of the fields for values that are not integers."""
        counts = Counts()
        for one in stored:
            counts.read += one.integer("in", maximum=_MAX)
            counts.written += one.integer("out", maximum=_MAX)
            for name, own in (("dropped", counts.dropped), ("noted", counts.noted)):
                section = one.section(name)
                own.update({reason: section.integer(reason, maximum=_MAX) for reason in section})
        return counts

    def __str__(self) -> str:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in self.dropped.most_common())
        return f"{self.read:,} in, {self.written:,} out" + (f"; dropped: {reasons}" if reasons else "")


class RecordDroppedError(DataError):
    """A record is left out. `reason` is the label that it is counted by, `detail` describes this record."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def convert_records(
    records: Iterable[tuple[int, Any]],
    convert: Callable[[int, Any], T],
    counts: Counts,
    failures: list[dict[str, Any]],
) -> Iterable[T]:
    """Yield `convert(row, record)` of each record; a RecordDroppedError is counted and appended to `failures`."""
    for row, record in records:
        counts.read += 1
        try:
            sample = convert(row, record)
        except RecordDroppedError as error:
            counts.dropped[error.reason] += 1
            failures.append({"row": row, "reason": error.reason, "detail": error.detail})
            continue
        counts.written += 1
        yield sample


@contextmanager
def locked_output(out: Path, shard: tuple[int, int] = (0, 1), events: Events = SILENT) -> Iterator[None]:
    """Lock the output directory of a step. Raises DirectoryInUseError.

    Workers `shard` = (k, n) share the directory, one process per k; a single worker (0 of 1) has it exclusively.
    Partial files of killed processes are removed first.
    """
    worker, workers = shard
    with ExitStack() as stack:
        stack.enter_context(DirectoryLock(out).acquire(shared=workers > 1, events=events))
        if workers > 1:
            stack.enter_context(DirectoryLock(out, f".lock-{worker}-of-{workers}").acquire(events=events))
        for folder in (out, out / "parts", out / "log"):
            remove_partials(folder)
        yield


def suffix_of(kind: Kind) -> str:
    """Return the file suffix of samples of `kind`."""
    return ".jsonl" if kind == "text" else ".tar"


def unit_names(paths: Sequence[Path]) -> dict[str, Path]:
    """Map unit names to input files, in alphabetical order. Raises ConfigError for equal names or no files."""
    units: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: (path.name, str(path))):
        name = safe_key(path.name.partition(".")[0])
        if name in units:
            raise ConfigError(f"same name up to the first dot as {units[name]}", file=path, hint="rename one")
        units[name] = path
    if not units:
        raise ConfigError("no input files", hint="name at least one")
    return units


def inputs_hash(units: Mapping[str, Path]) -> str:
    """Hash the names and sizes of the inputs, to compare them between workers. Raises ConfigError for missing files."""
    missing = [str(path) for path in units.values() if not path.is_file()]
    if missing:
        raise ConfigError.collect("missing inputs", missing)
    lines = (f"{name} {path.stat().st_size}\n" for name, path in units.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def units_of_worker(names: Iterable[str], shard: tuple[int, int]) -> list[str]:
    """Return every n-th name, starting at k, for worker `shard` = (k, n). Together the workers cover all names."""
    index, workers = shard
    if not 0 <= index < workers:
        raise ConfigError(field="shard", value=index, expected=f"a number from 0 to {workers - 1}")
    return [name for position, name in enumerate(names) if position % workers == index]


def unit_record_path(out: Path, unit: str) -> Path:
    """Return the path of the record of `unit`."""
    return out / "parts" / f"{unit}.part.json"


def unit_path(out: Path, unit: str, kind: Kind) -> Path:
    """Return the path of the samples of `unit`."""
    return out / "parts" / f"{unit}{suffix_of(kind)}"


def is_finished(out: Path, unit: str) -> bool:
    """Return whether `unit` is finished."""
    return unit_record_path(out, unit).is_file()


Convert = Callable[[str, Path, Counts, list[dict[str, Any]]], Iterable[Any]]
"""(unit, input file, counts, failures) -> samples; updates `counts` and `failures` while it is consumed."""


def write_units(
    name: str, units: Mapping[str, Path], out: Path, kind: Kind, convert: Convert, events: Events = SILENT
) -> None:
    """Convert the units that are not finished. `name` is the task that `events` shows."""
    with task(events, name, len(units), "files"):
        for unit, path in units.items():
            if not is_finished(out, unit):
                counts, failures = Counts(), list[dict[str, Any]]()
                write_unit(out, unit, kind, convert(unit, path, counts, failures), counts, failures)
                events.log(f"{unit}: {counts}")
            events.advanced(name)


def write_unit(
    out: Path, unit: str, kind: Kind, samples: Iterable[Any], counts: Counts, failures: Iterable[dict[str, Any]] = ()
) -> None:
    """Write the files of a unit atomically, its record last.

    samples: `TarSample`s, or JSON values for kind `text`. Consuming them may update `counts` and `failures`.
    """
    path = unit_path(out, unit, kind)
    with atomic_path(path) as part:
        if kind == "text":
            write_jsonl(part, samples)
        else:
            write_tar(part, samples)
        size, digest = part.stat().st_size, sha256_file(part)
    write_jsonl(path.with_name(f"{unit}.failures.jsonl"), failures)
    write_json(
        unit_record_path(out, unit),
        {"unit": unit, "samples": counts.written, "bytes": size, "sha256": digest, "counts": counts.as_json()},
    )


def read_unit_record(out: Path, unit: str) -> Fields:
    """Read the record of a finished unit. Raises DataError if it is not finished."""
    path = unit_record_path(out, unit)
    if not path.is_file():
        raise DataError(f"unit {unit!r} is not finished", file=path, hint="run its worker first")
    return Fields.of_file(path)


def check_unit(out: Path, unit: str, kind: Kind) -> int:
    """Return the number of samples of a finished unit. Raises DataError if its file does not match the record."""
    record, path = read_unit_record(out, unit), unit_path(out, unit, kind)
    samples = record.integer("samples", maximum=_MAX)
    size = record.integer("bytes", maximum=_MAX)
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        raise DataError(
            "size differs from the unit record",
            file=path,
            value=found,
            expected=f"{size} bytes",
            hint=f"delete {unit_record_path(out, unit)} and run the command again",
        )
    return samples


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Store the settings of the step in `out`, or compare them with the stored ones.

    Units made with different settings must not be mixed. Raises ConfigError listing every difference.
    """
    path = out / "settings.json"
    if not path.is_file():
        write_json(path, settings)
        return
    before = read_json_object(path, ConfigError)
    keys = sorted(before.keys() | settings.keys())
    changed = [
        ConfigError(
            "the directory was made with another value",
            field=key,
            value=settings.get(key),
            expected=repr(before.get(key)),
            hint="use the same settings or another output directory",
        )
        for key in keys
        if before.get(key, MISSING) != settings.get(key, MISSING)
    ]
    if changed:
        raise ConfigError.collect(str(out), changed)
