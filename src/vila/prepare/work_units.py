"""Parts: what one work unit gives, in `OUT/parts/`. A part is finished when its record, written last, is there.

UNIT.tar or UNIT.jsonl   the samples
UNIT.failures.jsonl      what could not be had, a line each: {"url" or "row", "reason", ...}
UNIT.part.json           the record: samples, bytes, sha256, counts
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from vila.core.errors import ConfigError, DataError
from vila.core.files import DirectoryLock, atomic_path, remove_partials, sha256_file, write_json, write_jsonl
from vila.core.progress import SILENT
from vila.core.reading import Fields, read_json_object
from vila.prepare.shards import TarSample, safe_key, write_tar

# --- counts
# What a step did, in numbers: how many records came in, how many went out, and why the others did not.


_MAX = 2**63 - 1


@dataclass(slots=True)
class Counts:
    """`read` = `written` + the sum of `dropped`; `noted` counts what happened to records that were kept."""

    read: int = 0
    written: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        """The form in which counts are stored, reasons in alphabetical order."""
        return {
            "in": self.read,
            "out": self.written,
            "dropped": dict(sorted(self.dropped.items())),
            "noted": dict(sorted(self.noted.items())),
        }

    @staticmethod
    def total(stored: Iterable[Fields]) -> Counts:
        """Add up stored counts. Raises the error of the fields for what is no number."""
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


P = ParamSpec("P")
T = TypeVar("T")

Kind = Literal["mmc4", "pairs", "vflan", "text"]
"""`mmc4`: documents; `pairs`: image and text; `vflan`: question, answer, images; `text`: JSON lines without images."""


def locks_output(prepare: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function with the arguments `out`, and perhaps `shard` and `events`: lock `out` while it runs.

    Workers k of n share the directory, each k once; a worker alone (0 of 1) has it to itself. What killed writers left
    in the directory is removed first. The function then raises DirectoryInUseError too.
    """
    signature = inspect.signature(prepare)

    @functools.wraps(prepare)
    def locked(*args: P.args, **kwargs: P.kwargs) -> T:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        out, events = given.arguments["out"], given.arguments.get("events", SILENT)
        worker, workers = given.arguments.get("shard", (0, 1))
        with ExitStack() as stack:
            stack.enter_context(DirectoryLock(out).acquire(shared=workers > 1, events=events))
            if workers > 1:
                stack.enter_context(DirectoryLock(out, f".lock-{worker}-of-{workers}").acquire(events=events))
            for folder in (out, out / "parts", out / "log"):
                remove_partials(folder)
            return prepare(*args, **kwargs)

    return locked


def suffix_of(kind: Kind) -> str:
    """The kind of file that samples of `kind` lie in."""
    return ".jsonl" if kind == "text" else ".tar"


def unit_names(paths: Sequence[Path]) -> dict[str, Path]:
    """Input files by the name of their work unit, in alphabetical order. Raises ConfigError when two names collide."""
    units: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: (path.name, str(path))):
        name = safe_key(path.name.partition(".")[0])
        if name in units:
            raise ConfigError(f"{path} and {units[name]} would both become unit {name!r}; rename one")
        units[name] = path
    if not units:
        raise ConfigError("no input files; name at least one")
    return units


def inputs_hash(units: Mapping[str, Path]) -> str:
    """One hash over the names and sizes of the inputs: workers must see the same ones. All must be there."""
    missing = [str(path) for path in units.values() if not path.is_file()]
    if missing:
        raise ConfigError.collect("missing inputs", missing)
    lines = (f"{name} {path.stat().st_size}\n" for name, path in units.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def units_of_worker(names: Iterable[str], shard: tuple[int, int]) -> list[str]:
    """The units of worker `shard` = (k, n), k from 0: every n-th. The workers' shares are disjoint and whole."""
    index, workers = shard
    if not 0 <= index < workers:
        raise ConfigError(f"shard {index} of {workers}: expected a number from 0 to {workers - 1}")
    return [name for position, name in enumerate(names) if position % workers == index]


def unit_record_path(out: Path, unit: str) -> Path:
    """Where the record of `unit` lies."""
    return out / "parts" / f"{unit}.part.json"


def unit_path(out: Path, unit: str, kind: Kind) -> Path:
    """Where the samples of `unit` lie."""
    return out / "parts" / f"{unit}{suffix_of(kind)}"


def is_finished(out: Path, unit: str) -> bool:
    """Whether `unit` needs no more work."""
    return unit_record_path(out, unit).is_file()


def write_unit(
    out: Path, unit: str, kind: Kind, samples: Iterable[Any], counts: Counts, failures: Iterable[dict[str, Any]] = ()
) -> None:
    """Write one part whole, its record last. `samples` may fill `counts` and what `failures` holds as it is consumed.

    samples: `TarSample`s, or plain values for kind `text`.
    """
    path = unit_path(out, unit, kind)
    with atomic_path(path) as part:
        if kind == "text":
            write_jsonl(part, samples)
        else:
            write_tar(part, _tar_samples(samples))
        size, digest = part.stat().st_size, sha256_file(part)
    write_jsonl(path.with_name(f"{unit}.failures.jsonl"), failures)
    write_json(
        unit_record_path(out, unit),
        {"unit": unit, "samples": counts.written, "bytes": size, "sha256": digest, "counts": counts.as_json()},
    )


def read_unit_record(out: Path, unit: str) -> Fields:
    """Read the record of a finished part. Raises DataError if the unit is not finished."""
    path = unit_record_path(out, unit)
    if not path.is_file():
        raise DataError(f"unit {unit!r} is not finished", file=path, hint="run its worker first")
    return Fields.of_file(path)


def check_unit(out: Path, unit: str, kind: Kind) -> int:
    """Return the number of samples of a finished part. Raises DataError if its file is not the one that was written."""
    record, path = read_unit_record(out, unit), unit_path(out, unit, kind)
    samples = record.integer("samples", maximum=2**63 - 1)
    size = record.integer("bytes", maximum=2**63 - 1)
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        raise DataError(
            "the part is not as it was written",
            file=path,
            value=found,
            expected=f"{size} bytes",
            hint=f"delete {unit_record_path(out, unit)} and prepare again",
        )
    return samples


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Store what `out` is prepared with, or compare it: parts of different settings may not be mixed.

    Raises ConfigError naming every difference.
    """
    path = out / "settings.json"
    if not path.is_file():
        write_json(path, settings)
        return
    before = read_json_object(path, ConfigError)
    keys = sorted(before.keys() | settings.keys())
    changed = [f"{key}: {before.get(key)!r} -> {settings.get(key)!r}" for key in keys if _differ(before, settings, key)]
    if changed:
        raise ConfigError.collect(f"{out}: begun with other settings; keep to them or choose another folder", changed)


def _differ(before: dict[str, Any], now: dict[str, Any], key: str) -> bool:
    return key not in before or key not in now or before[key] != now[key]


def _tar_samples(samples: Iterable[Any]) -> Iterable[TarSample]:
    for sample in samples:
        assert isinstance(sample, TarSample)
        yield sample
