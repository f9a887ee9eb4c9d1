"""Questions that come in files or through a pipe: `--messages`, `--batch`, standard input."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any

from vila.chat.content import messages_of, read_media
from vila.cli.conversation import Question
from vila.cli.media import media_path
from vila.core.errors import DataError
from vila.core.types import Image, Message, Video

_KEYS = ("id", "messages", "prompt", "image", "images", "video", "videos")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a batch file: a question, or a whole conversation in `messages`."""

    where: str
    id: str | int
    question: Question | None = None
    messages: tuple[Message, ...] = ()


def read_question(stream: IO[bytes]) -> str:
    """All of standard input as text, stripped. Raises DataError naming the first byte that is not UTF-8."""
    content = stream.read()
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(
            f"standard input: not UTF-8 text (byte {error.start + 1} is 0x{content[error.start]:02x}); "
            "convert it, for example with iconv -t utf-8"
        ) from error


def read_messages(path: Path, num_frames: int | None = None) -> tuple[Message, ...]:
    """The conversation in a JSON file, a list of messages or an object with one; paths start at the file's folder.

    Raises DataError naming file, message, part and value.
    """
    facts = _parsed(_content(path), str(path))
    rows = facts.get("messages") if isinstance(facts, dict) else facts
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path}: holds no messages; expected [{{...}}, ...] or {{'messages': [{{...}}, ...]}}")
    return messages_of(rows, where=str(path), read=_reader(path.parent, num_frames))


def read_rows(path: Path, num_frames: int | None = None) -> list[Row]:
    """Every line of a batch file; empty ones are skipped. Raises DataError naming the file and the line."""
    lines = enumerate(_content(path).splitlines(), start=1)
    rows = [_row(line, number, path, num_frames) for number, line in lines if line.strip()]
    if not rows:
        raise DataError(f"{path}: holds no lines; expected one JSON object a line")
    return rows


def _row(line: bytes, number: int, path: Path, num_frames: int | None) -> Row:
    where = f"{path} line {number}"
    facts = _parsed(line, where)
    if not isinstance(facts, dict):
        raise DataError(f"{where}: expected an object, got {type(facts).__name__}")
    for key in facts:
        if key not in _KEYS:
            near = get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(_KEYS)}"
            raise DataError(f"{where}: unknown key {key!r}; {hint}")
    identity = facts.get("id", number)
    if not isinstance(identity, (str, int)):
        raise DataError(f"{where}: id {identity!r} is neither a string nor a whole number")
    if ("messages" in facts) == ("prompt" in facts):
        raise DataError(f"{where}: expected either 'messages' or 'prompt'")
    if "messages" in facts:
        if extra := sorted(facts.keys() - {"id", "messages"}):
            raise DataError(f"{where}: {extra[0]!r} goes with 'prompt'; put media into the messages")
        read = _reader(path.parent, num_frames)
        return Row(where, identity, messages=messages_of(facts["messages"], where=where, read=read))
    if not isinstance(facts["prompt"], str):
        raise DataError(f"{where}: prompt {facts['prompt']!r} is not a string")
    images = [Image(below(path.parent, name)) for name in _names(facts, "image", "images", where)]
    videos = [Video(below(path.parent, name), num_frames) for name in _names(facts, "video", "videos", where)]
    return Row(where, identity, Question(facts["prompt"], images, videos, where=where))


def _names(facts: Mapping[str, Any], one: str, several: str, where: str) -> Iterator[str]:
    if one in facts and several in facts:
        raise DataError(f"{where}: both {one!r} and {several!r}; put all into {several!r}")
    value = facts.get(several, facts.get(one))
    names: Sequence[Any] = [] if value is None else value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: {one} {name!r} is not the name of a file")
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


def _content(path: Path) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def _parsed(content: bytes, where: str) -> Any:
    try:
        facts = json.loads(content.decode("utf-8-sig"))
        # A lone half of a surrogate pair is JSON, but no text.
        json.dumps(facts, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        wrong = content[error.start]
        raise DataError(f"{where}: not UTF-8 text (byte {error.start + 1} is 0x{wrong:02x})") from error
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: holds {error.object[error.start]!r}, which is half a character") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataError(f"{where}: not JSON ({error.msg} at {place})") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deep") from error
    return facts
