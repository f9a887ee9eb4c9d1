"""Dataset formats: protocol, registry, the source of samples that they share, and helpers for reading records."""

from __future__ import annotations

import glob
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vila.core.errors import ConfigError, DataError, UnknownNameError, VilaError, near_names
from vila.core.progress import SILENT, Events
from vila.core.registry import Registry
from vila.core.types import Image, Message, Part, Role, Sample, Text, Video
from vila.data.bad_samples import RecordLocation
from vila.data.formats.detect import EXTENSIONS, Guess, guess_members, guess_record
from vila.data.readers.index import open_index
from vila.data.readers.media_refs import Keys, key_path, value_at
from vila.data.readers.parquet import schema_record
from vila.data.readers.records import ParquetRecords, Record, RecordFile, open_records, unread_media
from vila.data.readers.tar import COMPRESSED

Options = TypeVar("Options")
Keep = tuple[str, Callable[[Record], bool]]


@dataclass(frozen=True, slots=True)
class NoOptions:
    """Options of a format without options."""


@dataclass(frozen=True)
class DatasetFormat:
    """A dataset format: makes a sample of each record of its files, whose extensions are in `EXTENSIONS`.

    name, summary: key in `FORMATS`, and a line for the documentation.
    convert:       function (record, root, options) that makes the sample of a record; raises DataError. Picklable.
    options:       dataclass of the options.
    columns:       columns of parquet files that `convert` needs; empty for all. Or a function of the options.
    media:         keys or columns that `convert` reads media from; or a function (record, options), picklable.
    keep:          name and predicate of the records that are not left out, None to keep all; a function of the options.
    check:         checks the options; raises VilaError.
    """

    name: str
    summary: str
    convert: Callable[..., Sample]
    options: type[Any] = NoOptions
    columns: tuple[str, ...] | Callable[[Any], tuple[str, ...]] = ()
    media: tuple[str, ...] | Callable[..., tuple[str, ...]] = ()
    keep: Callable[[Any], Keep | None] = lambda options: None
    check: Callable[[Any], None] = lambda options: None

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: Any) -> RecordSource:
        """Open a file, a directory of shards or a pattern (`shards/*.tar`).

        events: receives the progress of indexing, which each file needs once.
        options: those of the recipe's entry; an unknown option is a ConfigError that lists the known ones.
        The source raises DataError with file, record, field and value for a record that is not valid.
        """
        chosen = read_options(self.options, options, self.name)
        self.check(chosen)
        return RecordSource(
            path,
            partial(self.convert, root=image_root, options=chosen),
            kinds=EXTENSIONS[self.name],
            columns=self.columns(chosen) if callable(self.columns) else self.columns,
            events=events,
            keep=self.keep(chosen),
            media=partial(self.media, options=chosen) if callable(self.media) else self.media,
        )


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


ALL = (".tar", ".parquet", ".jsonl", ".json")
_FILES_CHECKED = 64
_RECORDS_CHECKED = 8
_TABLES = (".csv", ".tsv", ".xlsx")


class RecordSource:
    """Samples of one or more files, in the order of the file names. Images and videos are not opened."""

    def __init__(
        self,
        path: Path,
        convert: Callable[[Record], Sample],
        *,
        kinds: tuple[str, ...] = ALL,
        columns: tuple[str, ...] = (),
        events: Events = SILENT,
        keep: Keep | None = None,
        media: tuple[str, ...] | Callable[[Record], tuple[str, ...]] = (),
    ) -> None:
        """Open files; nothing but their indexes is read.

        convert: makes the sample of a record; raises DataError. Must be picklable.
        kinds:   file extensions of the format. columns: those of parquet files that `convert` needs.
        keep:    name and predicate; other records are left out. It is evaluated once for every record, then indexed.
        media:   keys or columns that `convert` reads media from; or a function of the record.
        Raises DataError if there is no such file, or none with these extensions.
        """
        self._convert, self._media = convert, media
        self.unread: Counter[str] = Counter()
        self._record_files: list[RecordFile] = []
        for file in data_files(path, kinds):
            records = open_records(file, columns, events)
            self._record_files.append(records if keep is None else _FilteredFile(records, *keep, events))
        self._ends = list(accumulate(map(len, self._record_files)))

    @property
    def files(self) -> list[Path]:
        """Files that samples are read from."""
        return [file.path for file in self._record_files]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        """Read sample number `index`. Raises IndexError outside range(len), DataError with file, record and field.

        A text-only sample whose record has media under a key that the format does not read is an error. Other unread
        media are counted in `unread`.
        """
        records, number = self._locate(index)
        record = records[number]
        sample = self._convert(record)
        self.unread.update(unread_media(record, sample, self._media(record) if callable(self._media) else self._media))
        return sample

    def location(self, index: int) -> RecordLocation:
        """Return file and record number of sample number `index`, from the indexes alone."""
        records, number = self._locate(index)
        return records.location(number)

    def _locate(self, index: int) -> tuple[RecordFile, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is outside range({len(self)})")
        file = bisect_right(self._ends, index)
        return self._record_files[file], index - (self._ends[file - 1] if file else 0)

    def check_format(self, name: str) -> None:
        """Raise DataError for a file whose records have another format than `name`, with the format they seem to have.

        That is a file of which none of a few evenly spaced records is valid or has the keys of `name`.
        """
        for records in self._record_files[:_FILES_CHECKED]:
            if len(records) and (guess := self._other_format(records, name)):
                raise DataError(
                    f"not in the format {name!r}; it looks like {guess.text}", file=records.path, hint=guess.hint
                )

    def _other_format(self, records: RecordFile, name: str) -> Guess | None:
        """Return the likely format of a file, None if `name` fits or the records are damaged."""
        if (
            isinstance(records, ParquetRecords)
            and name in guess_record(schema_record(records.path), ".parquet").formats
        ):
            return None  # the schema decides, before a row group is decoded
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


class _FilteredFile(RecordFile):
    """The records of a file that satisfy a predicate."""

    def __init__(self, records: RecordFile, name: str, predicate: Callable[[Record], bool], events: Events) -> None:
        def scan(path: Path, advanced: Callable[[int], None]) -> Iterator[np.ndarray]:
            record_bytes = path.stat().st_size // max(1, len(records))
            for number in range(len(records)):
                advanced(record_bytes)
                try:
                    is_kept = predicate(records[number])
                except DataError:
                    is_kept = True  # the error is raised when it is read
                if is_kept:
                    yield np.array([[number, 0]], dtype=np.uint64)

        super().__init__(records.path, open_index(records.path, f"kept {name}", scan, events))
        self._records = records

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
    """Return the data files of a path, sorted by name.

    Of a directory these are the files with the first extension of `kinds` that it contains: its `.tar` shards, not the
    `.json` files next to them. A path with `*`, `?` or `[` that does not exist is a pattern. Hidden files are ignored.
    Raises DataError if there are none.
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
        held = sorted({file.suffix or file.name for file in found})[:8]
        raise DataError("no data files in the directory", file=path, value=held, expected=" or ".join(kinds))
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
            "not a file of this format", file=path, value=path.suffix, expected=" or ".join(kinds), hint=_remedy(path)
        )
    return path


def _remedy(path: Path) -> str | None:
    """Return the hint for a file whose extension a format does not read."""
    suffix = path.suffix.lower()
    if suffix in _TABLES:
        return "convert a table with: vila data from-csv"
    if suffix in (".ndjson", ".txt") or (suffix in ALL and suffix != path.suffix):
        return f"rename it to {'.jsonl' if suffix not in ALL else suffix} if that is its content"
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
            "compressed files have no random access", file=path, hint="decompress it (it saves little for images)"
        )
    if path.suffix == ".pkl":
        hint = "convert shards of VILA with: vila data prepare pkl"
        raise DataError("pickle files can execute code and are not read", file=path, hint=hint)


def read_options(kind: type[Options], given: Mapping[str, Any], format_name: str) -> Options:
    """Return options as the dataclass of a format. Raises ConfigError naming every unknown or wrong option."""
    known = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]
    problems: list[VilaError] = []
    for name, value in given.items():
        if name not in known:
            problems.append(UnknownNameError("option", name, known, field="options"))
            continue
        choices = known[name].metadata.get("choices")
        field = f"options.{name}"
        if choices and value not in choices:
            near = near_names(str(value), map(str, choices), 1)
            hint = f"did you mean {near[0]!r}?" if near else None
            problems.append(ConfigError(field=field, value=value, expected=", ".join(map(repr, choices)), hint=hint))
        elif not choices and not _fits(value, known[name].default):
            problems.append(ConfigError(field=field, value=value, expected=type(known[name].default).__name__))
    if problems:
        raise ConfigError.collect(f"format {format_name!r}", problems)
    return kind(**given)


def _fits(value: Any, default: Any) -> bool:
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))


IMAGE_MARKER, VIDEO_MARKER = "<image>", "<video>"


def text_at(record: Record, keys: Sequence[str], at: Keys = ()) -> str:
    """Return the text at the first of `keys` that the object at key path `at` has. Raises DataError."""
    holder = value_at(record.value, at)
    if not isinstance(holder, Mapping):
        raise record.error(field=key_path(at), value=holder, expected="an object ({...})")
    for key in keys:
        if holder.get(key) is not None:
            if isinstance(holder[key], str):
                return str(holder[key])
            raise record.error(field=key_path((*at, key)), value=holder[key], expected="text")
    raise record.error("missing", field=" or ".join(key_path((*at, key)) for key in keys), hint=_keys_hint(holder))


def list_at(record: Record, key: str, items: str) -> list[Any]:
    """Return the list at a key of the record. Raises DataError for other types. items: description for the error."""
    value = record.value.get(key)
    if isinstance(value, list):
        return value
    if key not in record.value:
        raise record.error("missing", field=key, expected=f"a list of {items}", hint=_keys_hint(record.value))
    raise record.error(field=key, value=value, expected=f"a list of {items}")


def _keys_hint(found: Mapping[str, Any]) -> str:
    return f"found the keys {', '.join(map(repr, found))}" if found else "the object is empty"


def answer_at(record: Record, keys: Sequence[str], at: Keys = ()) -> str:
    """Return the text as `text_at` does. Raises DataError if it is empty or white space."""
    text = text_at(record, keys, at)
    if not text.strip():
        holder = value_at(record.value, at)
        key = next(key for key in keys if holder.get(key) is not None)
        raise record.error("the answer is empty", field=key_path((*at, key)), value=text)
    return text


def optional_text(record: Record, key: str) -> str:
    """Return the text at a key of the record, "" if it is absent or null. Raises DataError for other types."""
    return "" if record.value.get(key) is None else text_at(record, (key,))


def id_of(record: Record) -> str:
    """Return the `id` of the record, else one made of file and number. Raises DataError if it is not text or number."""
    value = record.value.get("id")
    if value is None or value == "":
        return record.name
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise record.error(field="id", value=value, expected="text or a number")
    return str(value)


def merge_texts(parts: Iterable[Part | str]) -> tuple[Part, ...]:
    """Join adjacent texts and remove empty ones."""
    out: list[Part] = []
    for part in parts:
        part = Text(part) if isinstance(part, str) else part
        if isinstance(part, Text) and out and isinstance(out[-1], Text):
            out[-1] = Text(out[-1].text + part.text)
        elif not isinstance(part, Text) or part.text:
            out.append(part)
    return tuple(out)


def media_first(media: Iterable[Image | Video], text: str) -> tuple[Part, ...]:
    """Return each image or video followed by a newline, then the text, as VILA formats questions about images."""
    pieces: list[Part | str] = []
    for item in media:
        pieces += [item, "\n"]
    return merge_texts([*pieces, text])


def question_answers(turns: Iterable[tuple[str, str]], media: Sequence[Image | Video]) -> tuple[Message, ...]:
    """Return the messages of (question, answer) turns, with the media before the first question, see `media_first`."""
    messages: list[Message] = []
    for question, answer in turns:
        messages.append(Message("user", media_first(() if messages else media, question)))
        messages.append(Message.of("assistant", answer))
    return tuple(messages)


def page_sample(record: Record, parts: tuple[Part, ...]) -> Sample:
    """Return a page of text and images, or an image and its caption: one message, whose whole text is supervised."""
    return Sample(id_of(record), (Message("user", parts),), template="page")


def caption_of(record: Record, keys: Sequence[str]) -> str:
    """Return the member `txt`, else the text at the first of `keys`. Raises DataError if it is empty."""
    has_member = "txt" in record.members
    text = record.read_text("txt") if has_member else text_at(record, keys)
    if not text.strip():
        raise record.error("the text is empty", field="txt" if has_member else keys[0])
    return text


def conversation_turns(record: Record, roles: Mapping[str, Role], expected: str) -> Iterator[tuple[str, Role, str]]:
    """Yield field, role and text of each turn in `conversations` of `from` and `value`. Raises DataError.

    roles: by speaker. expected: description of the speakers, for the error.
    """
    for number, turn in enumerate(list_at(record, "conversations", "turns")):
        field = f"conversations[{number}]"
        if not isinstance(turn, Mapping):
            raise record.error(field=field, value=turn, expected="an object with 'from' and 'value'")
        speaker, text = turn.get("from"), turn.get("value")
        if not isinstance(speaker, str) or speaker not in roles:
            raise record.error(field=f"{field}.from", value=speaker, expected=expected)
        if not isinstance(text, str):
            raise record.error(field=f"{field}.value", value=text, expected="text")
        yield field, roles[speaker], text


def remove_markers(text: str, *markers: str) -> str:
    """Remove markers from a text, each with the newline after it, else with the newline before it."""
    for marker in markers:
        text = text.replace(f"{marker}\n", "").replace(f"\n{marker}", "").replace(marker, "")
    return text


def check_turns(messages: Sequence[Message], record: Record, field: str) -> tuple[Message, ...]:
    """Return the messages if roles alternate, the assistant is last, and no answer is empty; else raise DataError.

    A system message may be first.
    field: list of the record that the messages are from, for the error; message k is `field[k]`.
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
        raise record.error("the last turn must be an answer of the assistant", field=field)
    return tuple(messages)
