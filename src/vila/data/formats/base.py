"""What a dataset format does, and the table of those that exist."""

from __future__ import annotations

import glob
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from vila.core.errors import ConfigError, DataError, VilaError, near_names
from vila.core.progress import SILENT, Events
from vila.core.registry import Registry
from vila.core.types import Image, Message, Part, Sample, Text, Video
from vila.data.bad_samples import RecordLocation
from vila.data.formats.detect import Guess, guess_members, guess_record
from vila.data.mixture import Source
from vila.data.readers.index import open_index
from vila.data.readers.media_refs import Keys, key_path, value_at
from vila.data.readers.parquet import schema_record
from vila.data.readers.records import ParquetRecords, Record, RecordFile, open_records, unread_media
from vila.data.readers.tar import COMPRESSED


class DatasetFormat(Protocol):
    """Opens files of one kind."""

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: Any) -> Source:
        """Random access to samples of a file, a directory of shards or a pattern (`shards/*.tar`).

        events: told how files are indexed, which is done once for each.
        options: what the recipe's entry says; one that the format does not know is a ConfigError listing those it does.
        Raises DataError naming file, record and reason for what cannot become a sample.
        """


FORMATS: Registry[DatasetFormat] = Registry(
    "dataset format",
    {
        "messages": "vila.data.formats.messages:FORMAT",
        "llava_json": "vila.data.formats.llava:FORMAT",
        "llava_json_v15": "vila.data.formats.llava:V15_FORMAT",
        "mmc4": "vila.data.formats.mmc4:FORMAT",
        "coyo": "vila.data.formats.coyo:FORMAT",
        "webdataset": "vila.data.formats.webdataset:FORMAT",
        "vflan": "vila.data.formats.vflan:FORMAT",
        "flan": "vila.data.formats.flan:FORMAT",
        "interleaved": "vila.data.formats.interleaved:FORMAT",
        "cauldron": "vila.data.formats.cauldron:FORMAT",
        "video_json": "vila.data.formats.video:FORMAT",
    },
)


# --- source
# One source of samples from a file, a directory of shards or a pattern; options and file types are checked.


JSON = (".jsonl", ".json")
ALL = (".tar", ".parquet", *JSON)
_FILES_CHECKED = 64
_RECORDS_CHECKED = 8
_TABLES = (".csv", ".tsv", ".xlsx")

Options = TypeVar("Options")


class RecordSource:
    """Samples of one or more files, in the order of their names. Media stay unopened."""

    def __init__(
        self,
        path: Path,
        convert: Callable[[Record], Sample],
        *,
        kinds: tuple[str, ...] = ALL,
        columns: tuple[str, ...] = (),
        events: Events = SILENT,
        keep: tuple[str, Callable[[Record], bool]] | None = None,
        media: tuple[str, ...] | Callable[[Record], tuple[str, ...]] = (),
    ) -> None:
        """convert: makes the sample of a record; raises DataError. Picklable, so that the source is.

        kinds: ends of file names that are read. columns: those of parquet files that `convert` needs.
        keep: name of a rule and the rule; records that it refuses are left out. It is called once for every record.
        media: keys of the record, or columns, that `convert` reads media from; or a function of the record.
        Raises DataError if there is no such file, or none of these kinds.
        """
        self._convert, self._media = convert, media
        self.unread: Counter[str] = Counter()
        self._parts: list[RecordFile] = []
        for file in data_files(path, kinds):
            records = open_records(file, columns, events)
            self._parts.append(records if keep is None else _Kept(records, *keep, events))
        self._ends = list(accumulate(map(len, self._parts)))

    @property
    def files(self) -> list[Path]:
        """The files that samples are read from."""
        return [part.path for part in self._parts]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        """Read sample number `index`. Raises IndexError outside range(len), DataError with file, record and field.

        A record that becomes text alone, while it holds media under a key that the format does not read, is an error.
        Other media that are not read are counted in `unread`.
        """
        records, number = self._locate(index)
        record = records[number]
        sample = self._convert(record)
        self.unread.update(unread_media(record, sample, self._media(record) if callable(self._media) else self._media))
        return sample

    def location(self, index: int) -> RecordLocation:
        """Return the file of sample number `index` and the number of its record there; nothing is read but indexes."""
        records, number = self._locate(index)
        return records.location(number)

    def _locate(self, index: int) -> tuple[RecordFile, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is outside range({len(self)})")
        part = bisect_right(self._ends, index)
        return self._parts[part], index - (self._ends[part - 1] if part else 0)

    def check_format(self, name: str) -> None:
        """Raise one DataError for a file whose records are in another format than `name`, with what they look like.

        A file is refused if none of some evenly spaced records becomes a sample, and none has the keys of `name`.
        """
        for records in self._parts[:_FILES_CHECKED]:
            if len(records) and (guess := self._other_format(records, name)):
                raise DataError(
                    f"not in the format {name!r}; it looks like {guess.text}", file=records.path, hint=guess.hint
                )

    def _other_format(self, records: RecordFile, name: str) -> Guess | None:
        """Return what the records of a file look like, or None if the format is right or the records are damaged."""
        if (
            isinstance(records, ParquetRecords)
            and name in guess_record(schema_record(records.path), ".parquet").formats
        ):
            return None  # decided by the schema, before a row group is decoded
        count = min(len(records), _RECORDS_CHECKED)
        found = None
        for number in range(count):
            try:
                record = records[number * len(records) // count]
            except VilaError:
                continue
            guess = _guess_record(record, records.path.suffix)
            if name in guess.formats:
                return None
            try:
                self._convert(record)
            except VilaError:
                found = found or guess
            else:
                return None
        return found


class _Kept:
    """The records of a file that a rule keeps."""

    def __init__(self, records: RecordFile, name: str, rule: Callable[[Record], bool], events: Events) -> None:
        self.path, self._records = records.path, records

        def scan(path: Path, advanced: Callable[[int], None]) -> Iterator[np.ndarray]:
            share = path.stat().st_size // max(1, len(records))
            for number in range(len(records)):
                advanced(share)
                try:
                    kept = rule(records[number])
                except DataError:
                    kept = True  # reported when it is read
                if kept:
                    yield np.array([[number, 0]], dtype=np.uint64)

        self._index = open_index(records.path, f"kept {name}", scan, events)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> Record:
        return self._records[self._index[number][0]]

    def location(self, number: int) -> RecordLocation:
        return self._records.location(self._index[number][0])


def _guess_record(record: Record, suffix: str) -> Guess:
    if record.in_shard:
        guess = guess_record(record.value, suffix)
        return guess if guess.formats or not record.members else guess_members(record.members)
    if suffix == ".parquet":
        return guess_record(schema_record(record.file), suffix)
    return guess_record(record.value, suffix)


def data_files(path: Path, kinds: tuple[str, ...]) -> list[Path]:
    """Return the files that `path` stands for, sorted by name.

    A directory gives its files of the first of `kinds` that it has any of: the `.tar` shards, not the `.json` beside
    them. A path with `*`, `?` or `[` that does not exist is a pattern. Hidden files are left out.
    Raises DataError.
    """
    if path.is_file():
        return [_readable(path, kinds)]
    if path.is_dir():
        found = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
        for kind in kinds:
            if chosen := [file for file in found if file.suffix == kind]:
                return chosen
        for file in found:
            _refuse_compressed(file)
        held = ", ".join(sorted({file.suffix or file.name for file in found})[:8]) or "no files"
        raise DataError(f"the directory holds no {' or '.join(kinds)} files", file=path, hint=f"it holds {held}")
    if any(character in str(path) for character in "*?["):
        matching = [Path(name) for name in sorted(glob.glob(str(path)))]  # noqa: PTH207 the pattern may be absolute
        if matching:
            return [_readable(file, kinds) for file in matching]
        raise DataError("no file matches the pattern", file=path)
    raise DataError("no such file", file=path)


def _readable(path: Path, kinds: tuple[str, ...]) -> Path:
    _refuse_compressed(path)
    if path.suffix not in kinds:
        raise DataError(
            "not read by this format", file=path, value=path.suffix, expected=" or ".join(kinds), hint=_remedy(path)
        )
    return path


def _remedy(path: Path) -> str | None:
    """Return what to do with a file whose extension a format does not read."""
    suffix = path.suffix.lower()
    if suffix in _TABLES:
        return "convert a table with: vila data from-csv"
    if suffix in (".ndjson", ".txt") or (suffix in ALL and suffix != path.suffix):
        return f"rename it to {'.jsonl' if suffix not in ALL else suffix}, if that is what it holds"
    if path.suffix not in ALL:
        return None
    try:
        records = open_records(path)
        guess = guess_record(schema_record(path), suffix) if suffix == ".parquet" else _guess_record(records[0], suffix)
    except (VilaError, IndexError):
        return None
    return f"it looks like {guess.text}; {guess.hint}"


def _refuse_compressed(path: Path) -> None:
    if path.name.lower().endswith((*COMPRESSED, ".gz", ".zst", ".xz", ".bz2", ".zip")):
        raise DataError(
            "compressed files allow no random access", file=path, hint="unpack it (images inside hardly shrink)"
        )
    if path.suffix == ".pkl":
        raise DataError(
            "pickles can run code and are not read",
            file=path,
            hint="convert shards of VILA with: vila data prepare pkl",
        )


def read_options(kind: type[Options], given: Mapping[str, Any], format_name: str) -> Options:
    """Options of a format as its dataclass of options. Raises ConfigError naming every option that is not right."""
    known = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]
    problems = []
    for name, value in given.items():
        if name not in known:
            near = near_names(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            problems.append(f"unknown option {name!r}{hint} (known: {', '.join(known) or 'none'})")
            continue
        choices = known[name].metadata.get("choices")
        if choices and value not in choices:
            near = near_names(str(value), map(str, choices), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            problems.append(f"option {name!r} is {value!r}, not one of {', '.join(map(repr, choices))}{hint}")
        elif not choices and not _fits(value, known[name].default):
            problems.append(f"option {name!r} is {value!r}, expected {type(known[name].default).__name__}")
    if problems:
        raise ConfigError.collect(f"format {format_name!r}", problems)
    return kind(**given)


def _fits(value: Any, default: Any) -> bool:
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))


# --- turns
# Conversations as data sets write them: text with markers, turns that must alternate, fields that must be text.


IMAGE_MARKER, VIDEO_MARKER = "<image>", "<video>"


def text_at(record: Record, keys: Sequence[str], place: Keys = ()) -> str:
    """Return the text under the first of `keys` that the object at `place` of the record has. Raises DataError."""
    holder = value_at(record.value, place)
    if not isinstance(holder, Mapping):
        raise record.error(field=key_path(place), value=holder, expected="an object ({...})")
    for key in keys:
        if holder.get(key) is not None:
            if isinstance(holder[key], str):
                return str(holder[key])
            raise record.error(field=key_path((*place, key)), value=holder[key], expected="text")
    found = f"the object has {', '.join(map(repr, holder)) or 'no keys'}"
    raise record.error(f"missing; {found}", field=" or ".join(key_path((*place, key)) for key in keys))


def list_at(record: Record, key: str, items: str) -> list[Any]:
    """Return the list under a key of the record. Raises DataError for any other type. items: for errors."""
    value = record.value.get(key)
    if isinstance(value, list):
        return value
    if key not in record.value:
        raise record.error(
            f"missing; the record has {', '.join(map(repr, record.value)) or 'no keys'}",
            field=key,
            expected=f"a list of {items}",
        )
    raise record.error(field=key, value=value, expected=f"a list of {items}")


def answer_at(record: Record, keys: Sequence[str], place: Keys = ()) -> str:
    """Return the text that `text_at` finds, which must hold more than white space. Raises DataError."""
    text = text_at(record, keys, place)
    if not text.strip():
        holder = value_at(record.value, place)
        key = next(key for key in keys if holder.get(key) is not None)
        raise record.error("the answer is empty", field=key_path((*place, key)), value=text)
    return text


def optional_text(record: Record, key: str) -> str:
    """Return the text under a key of the record, "" if it is absent or null. Raises DataError for any other type."""
    return "" if record.value.get(key) is None else text_at(record, (key,))


def id_of(record: Record) -> str:
    """Return the record's own id, or one made of file and number. Raises DataError if it is neither text nor number."""
    value = record.value.get("id")
    if value is None or value == "":
        return record.name
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise record.error(field="id", value=value, expected="text or a number")
    return str(value)


def merge_texts(parts: Iterable[Part | str]) -> tuple[Part, ...]:
    """Join neighbouring texts and leave out empty ones."""
    out: list[Part] = []
    for part in parts:
        part = Text(part) if isinstance(part, str) else part
        if isinstance(part, Text) and out and isinstance(out[-1], Text):
            out[-1] = Text(out[-1].text + part.text)
        elif not isinstance(part, Text) or part.text:
            out.append(part)
    return tuple(out)


def media_first(media: Iterable[Image | Video], text: str) -> tuple[Part, ...]:
    """Return each medium and a newline, then the text: how the original asks about images."""
    pieces: list[Part | str] = []
    for item in media:
        pieces += [item, "\n"]
    return merge_texts([*pieces, text])


def remove_markers(text: str, *markers: str) -> str:
    """Remove `markers` from the text, each with the newline behind it, or else the one in front of it."""
    for marker in markers:
        text = text.replace(f"{marker}\n", "").replace(f"\n{marker}", "").replace(marker, "")
    return text


def check_turns(messages: Sequence[Message], record: Record, field: str) -> tuple[Message, ...]:
    """Return the messages if user and assistant alternate, the assistant ends and no answer is empty.

    A system message may come first.
    field: list of the record that the messages were read from; message k is called `field[k]`.
    Raises DataError with the turn.
    """
    body = messages[1:] if messages and messages[0].role == "system" else messages
    first = len(messages) - len(body)
    for number, message in enumerate(body):
        turn = f"{field}[{first + number}]"
        expected = ("user", "assistant")[number % 2]
        if message.role != expected:
            raise record.error("roles do not alternate", field=turn, value=message.role, expected=expected)
        if message.role == "assistant" and not message.text.strip():
            raise record.error("the answer is empty", field=turn, value=message.text)
    if not body or body[-1].role != "assistant":
        raise record.error("the last turn is not the assistant's", field=field)
    return tuple(messages)
