"""Questions that come in files or through a pipe: `--messages`, `--batch`, standard input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from vila.chat.content import parse_messages, read_media
from vila.cli.options import media_path
from vila.cli.prompt_input import Question
from vila.core.errors import DataError, near_names
from vila.core.reading import file_errors, read_json, read_jsonl
from vila.core.types import Image, Message, Part, Text, Video

_MEDIA_KEYS = frozenset(("image", "images", "video", "videos"))
_KEYS = ("id", "messages", "prompt", "image", "images", "video", "videos")
_STDIN = "standard input"
_GIVE = "name media in 'images' and 'videos'; text that spells a marker goes into 'messages', as a text part"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a batch file: a question, or a whole conversation in `messages`. record: "line N" of `file`."""

    file: Path
    record: str
    id: str | int
    question: Question | None = None
    messages: tuple[Message, ...] = ()


def read_question(stream: IO[bytes]) -> str:
    """Return all of standard input as text, stripped. Raises DataError naming the first byte that is not UTF-8."""
    with file_errors(_STDIN):
        content = stream.read()
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 text (byte {error.start + 1} is 0x{content[error.start]:02x})",
            file=_STDIN,
            hint="convert it, for example with iconv -t utf-8",
        ) from error


def read_messages(path: Path, num_frames: int | None = None) -> tuple[Message, ...]:
    """Read a conversation from a JSON file: a list of messages, or an object that holds one under `messages`.

    Relative paths start at the file's folder. Raises DataError naming file, message, part and value.
    """
    facts = read_json(path.expanduser())
    rows = facts.get("messages") if isinstance(facts, dict) else facts
    if unread := sorted(_MEDIA_KEYS & facts.keys()) if isinstance(facts, dict) else []:
        # Training data have them beside the messages; a conversation has them in its parts.
        raise DataError("media beside the messages", file=path, field=unread[0], hint="put them into the messages")
    if not isinstance(rows, list) or not rows:
        raise DataError("holds no messages", file=path, expected="[{...}, ...] or {'messages': [{...}, ...]}")
    try:
        return _conversation(rows, path.parent, num_frames)
    except DataError as error:
        error.within(path)
        raise


def read_rows(path: Path, num_frames: int | None = None) -> list[Row]:
    """Read every line of a batch file; empty ones are skipped. Raises DataError naming file, line and field."""
    rows = []
    for number, facts in read_jsonl(path.expanduser()):
        record = f"line {number}"
        try:
            rows.append(_row(facts, number, path, num_frames))
        except DataError as error:
            error.within(path, record)
            raise
    if not rows:
        raise DataError("holds no lines", file=path, expected="one JSON object per line")
    return rows


def _row(facts: Any, number: int, path: Path, num_frames: int | None) -> Row:
    if not isinstance(facts, dict):
        raise DataError(value=facts, expected="an object")
    for key in facts:
        if key not in _KEYS:
            near = near_names(key, _KEYS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(_KEYS)}"
            raise DataError(f"unknown key {key!r}", field=key, hint=hint)
    identity = facts.get("id", number)
    if not isinstance(identity, (str, int)) or isinstance(identity, bool):
        raise DataError(field="id", value=identity, expected="a string or a whole number")
    if ("messages" in facts) == ("prompt" in facts):
        raise DataError("expected either 'messages' or 'prompt'")
    record, folder = f"line {number}", path.parent
    if "messages" in facts:
        if extra := sorted(facts.keys() - {"id", "messages"}):
            raise DataError(f"{extra[0]!r} goes with 'prompt'", field=extra[0], hint="put media into the messages")
        return Row(path, record, identity, messages=_conversation(facts["messages"], folder, num_frames))
    prompt = facts["prompt"]
    if not isinstance(prompt, str):
        raise DataError(field="prompt", value=prompt, expected="a string")
    images = [Image(below(folder, name)) for name in _names(facts, "image", "images")]
    videos = [Video(below(folder, name), num_frames) for name in _names(facts, "video", "videos")]
    if not (prompt.strip() or images or videos):
        raise DataError("the question is empty", field="prompt", value=prompt)
    return Row(path, record, identity, Question(prompt, images, videos, where="prompt", give=_GIVE))


def _conversation(rows: Any, folder: Path, num_frames: int | None) -> tuple[Message, ...]:
    """Build the messages of a file. Raises DataError when the last one asks nothing: no text and no media."""
    messages = parse_messages(rows, read=_reader(folder, num_frames))
    if messages and messages[-1].role == "user" and all(_is_blank(part) for part in messages[-1].parts):
        raise DataError("the question is empty", field="messages", hint=f"write it into message {len(messages)}")
    return messages


def _is_blank(part: Part) -> bool:
    return isinstance(part, Text) and not part.text.strip()


def _names(facts: Mapping[str, Any], one: str, several: str) -> Iterator[str]:
    if one in facts and several in facts:
        raise DataError(f"both {one!r} and {several!r}", field=one, hint=f"put all into {several!r}")
    key = several if several in facts else one
    value = facts.get(key)
    names: Sequence[Any] = [] if value is None else value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not name:
            raise DataError(field=key, value=name, expected="the name of a file")
        yield name


def below(folder: Path, name: str) -> Path | str:
    """A URL as it is; a path, when relative, below `folder`."""
    source = media_path(name)
    return folder / source if isinstance(source, Path) else source


def _reader(folder: Path, num_frames: int | None) -> Callable[[Mapping[str, Any], str], Image | Video]:
    """Reads media of content parts: relative paths below `folder`, clips with the command's number of frames."""

    def read(part: Mapping[str, Any], where: str) -> Image | Video:
        medium = read_media(part, where)
        if isinstance(medium.source, Path):
            medium = replace(medium, source=below(folder, str(medium.source)))
        if isinstance(medium, Video) and medium.num_frames is None:
            medium = replace(medium, num_frames=num_frames)
        return medium

    return read
