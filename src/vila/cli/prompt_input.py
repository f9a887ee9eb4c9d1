"""Prompt input of `vila run` and `vila chat`: flags, files and standard input to messages for the engine.

`--prompt` with `--image` and `--video`, few-shot examples (`--shot`), a conversation (`--messages`) and a file of
prompts (`--batch-file`). Media are checked before a model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import typer
from typer.core import TyperCommand

from vila.chat.content import parse_messages, read_media
from vila.core.errors import ConfigError, DataError, MediaError, near_names
from vila.core.reading import file_errors, read_json, read_jsonl
from vila.core.types import Image, Message, Part, Text, Video

# --- images and videos


def media_path(name: str) -> Path | str:
    """Return a URL as it is, anything else as a path with `~` expanded."""
    return name if "://" in name or name.startswith("data:") else Path(name).expanduser()


def image_of(name: str) -> Image:
    """Return the image with a path or URL."""
    return Image(media_path(name))


def video_of(name: str, num_frames: int | None) -> Video:
    """Return the video with a path or URL."""
    return Video(media_path(name), num_frames)


def check_video_file(video: Video) -> None:
    """Raise MediaError if the video is a path without a file. Its content is checked when it is decoded."""
    if isinstance(video.source, Path) and not video.source.is_file():
        problem = "a directory, not a video" if video.source.is_dir() else "no such file"
        raise MediaError(problem, file=video.source, hint="give the path of one file")


def load_image(image: Image) -> tuple[Image, tuple[int, int]]:
    """Return the image with its encoded bytes in memory, and its (width, height).

    The bytes are decoded once as a check; EXIF rotation follows the model's settings later. Raises MediaError.
    """
    from PIL import Image as PilImage

    from vila.media.image import LoadedMedia, open_image, open_source

    if not isinstance(image.source, PilImage.Image):
        stream, name = open_source(image.source, "an image")
        with stream:
            image = Image(LoadedMedia(name, stream.read()))
    return image, open_image(image).size


def load_images(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the messages with every image in memory, so that each URL is fetched once.

    Raises MediaError for an image that cannot be decoded and for a video without a file.
    """
    return tuple(replace(message, parts=tuple(map(_loaded, message.parts))) for message in messages)


def _loaded(part: Part) -> Part:
    if isinstance(part, Video):
        check_video_file(part)
    return load_image(part)[0] if isinstance(part, Image) else part


# --- few-shot examples (--shot)

KEYS = ("image", "question", "text")
_FORM = 'write --shot image=a.png text="a circle", with question=... if the example has its own question'
_WORD = re.compile(r"\w+=")
_INNER = re.compile(r"\s(\w+)=")
_BORDER = re.compile(rf"\s+(?=(?:{'|'.join(KEYS)})=)")
# Joins the words of one --shot into one argument; it cannot be typed.
_SEPARATOR = "\x1f"


@dataclass(frozen=True, slots=True)
class Shot:
    """A few-shot example. `text` is the answer; without a `question`, the example repeats the final question."""

    text: str
    image: Image | None = None
    question: str | None = None


class ShotCommand(TyperCommand):
    """Typer command whose `--shot` takes all `KEY=VALUE` words that follow it."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Fold the words of each `--shot`, then parse."""
        return super().parse_args(ctx, fold_words(args))


def fold_words(arguments: Sequence[str]) -> list[str]:
    """Join each `--shot` and its `KEY=VALUE` words into one argument. Arguments after `--` stay unchanged."""
    out: list[str] = []
    waiting = list(reversed(arguments))
    while waiting:
        word = waiting.pop()
        if word == "--":
            return [*out, word, *reversed(waiting)]
        if word == "--shot" and waiting:
            words = [waiting.pop()]
        elif word.startswith("--shot="):
            words = [word.removeprefix("--shot=")]
        else:
            out.append(word)
            continue
        while waiting and _WORD.match(waiting[-1]):
            words.append(waiting.pop())
        out.append(f"--shot={_SEPARATOR.join(words)}")
    return out


def parse_shot(option: str) -> Shot:
    """Parse the value of `--shot`. Raises ConfigError for missing, repeated and unknown keys."""
    words = option.split(_SEPARATOR)
    shown = " ".join(words)
    if len(words) == 1:
        words = _BORDER.split(option.strip())
        if words[0].startswith("image=") and (unknown := _INNER.search(words[0])):
            raise _unknown_key(shown, unknown[1])
    fields: dict[str, str] = {}
    for word in words:
        key, _, value = word.partition("=")
        if not _WORD.match(word):
            raise _shot_error(f"{word!r} is not of the form KEY=VALUE", shown)
        if key not in KEYS:
            raise _unknown_key(shown, key)
        if key in fields:
            raise _shot_error(f"{key}= is given twice; give each example its own --shot", shown)
        fields[key] = value
    if not fields.get("text", "").strip():
        raise _shot_error("text= with the answer is missing", shown)
    if "image" in fields and not fields["image"]:
        raise _shot_error("image= is empty; leave it out for an example without an image", shown)
    image = image_of(fields["image"]) if "image" in fields else None
    return Shot(fields["text"], image, fields.get("question"))


def _shot_error(problem: str, shown: str, hint: str = _FORM) -> ConfigError:
    return ConfigError(problem, field="--shot", value=shown, hint=hint)


def _unknown_key(shown: str, key: str) -> ConfigError:
    near = near_names(key, KEYS, 1)
    suggestion = f"did you mean {near[0]!r}? " if near else ""
    return _shot_error(f"unknown key {key!r} (known: {', '.join(KEYS)})", shown, f"{suggestion}{_FORM}")


def with_images_loaded(shots: Sequence[Shot]) -> list[Shot]:
    """Return the examples with their images in memory. Raises MediaError for an image that cannot be decoded."""
    return [shot if shot.image is None else replace(shot, image=load_image(shot.image)[0]) for shot in shots]


# --- conversations

_IMAGE, _VIDEO = "<image>", "<video>"
_MARKERS = re.compile(f"({_IMAGE}|{_VIDEO})")


@dataclass(frozen=True, slots=True)
class Question:
    """The last user turn of a conversation.

    gap:   text after each image that is put before the question; None uses the template's `media_gap`.
    where: name of the text in errors.
    give:  hint of the error for markers without any media.
    """

    text: str
    images: Sequence[Image] = ()
    videos: Sequence[Video] = ()
    gap: str | None = None
    where: str = "--prompt"
    give: str = "pass --image FILE or --video FILE; text that contains a literal marker goes into --messages"


def build_conversation(
    question: Question, gap: str, *, shots: Sequence[Shot] = (), system: str | None = None
) -> tuple[Message, ...]:
    """Return the system message, the few-shot examples and the question. `gap` is the template's `media_gap`.

    Raises MediaError if the numbers of markers and media differ.
    """
    gap = gap if question.gap is None else question.gap
    messages: list[Message] = []
    for number, shot in enumerate(shots, start=1):
        example = _example(shot, question, f"--shot {number}")
        answer = check_text(shot.text, example.where)
        messages += [Message("user", place_media(example, gap)), Message.of("assistant", answer)]
    return with_system([*messages, Message("user", place_media(question, gap))], system)


def _example(shot: Shot, question: Question, where: str) -> Question:
    images = () if shot.image is None else (shot.image,)
    if shot.question is None:
        return replace(question, images=images, videos=(), where=where)
    return Question(check_text(shot.question, where), images, where=where)


def place_media(question: Question, gap: str) -> tuple[Part, ...]:
    """Return the parts of a user turn: media replace their markers in the text, or precede a text without markers.

    Raises MediaError if the numbers of markers and media differ.
    """
    text = question.text
    found = {_IMAGE: text.count(_IMAGE), _VIDEO: text.count(_VIDEO)}
    if not any(found.values()):
        # The processor inserts the gaps between the frames of a video.
        before = [part for image in question.images for part in (image, Text(gap))]
        return _joined([*before, *question.videos, Text(text)])
    problems = [
        f"{_count(found[marker], f'{marker} marker')} but {_count(len(given), name)}"
        for marker, given, name in ((_IMAGE, question.images, "image"), (_VIDEO, question.videos, "video"))
        if found[marker] != len(given)
    ]
    if problems:
        has_media = bool(question.images or question.videos)
        raise MediaError(
            f"{', and '.join(problems)} given",
            field=question.where,
            hint="write a marker for each, or none to put the media first" if has_media else question.give,
        )
    waiting: dict[str, Iterator[Part]] = {_IMAGE: iter(question.images), _VIDEO: iter(question.videos)}
    return _joined([next(waiting[piece]) if piece in waiting else Text(piece) for piece in _MARKERS.split(text)])


def _joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Join adjacent text parts and drop empty ones."""
    out: list[Part] = []
    for part in parts:
        if isinstance(part, Text) and out and isinstance(out[-1], Text):
            out[-1] = Text(out[-1].text + part.text)
        else:
            out.append(part)
    return tuple(part for part in out if not (isinstance(part, Text) and not part.text))


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def with_system(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    """Put the `--system` message first. Raises ConfigError if the messages already have a system message."""
    if system is None:
        return tuple(messages)
    if messages and messages[0].role == "system":
        raise ConfigError("the messages already begin with a system message", field="--system", hint="leave one out")
    return (Message.of("system", check_text(system, "the system text")), *messages)


def check_text(text: str, where: str) -> str:
    """Return the text. Raises ConfigError if it has bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"not UTF-8 text (character {error.start + 1} is {text[error.start]!r})"
        raise ConfigError(problem, field=where) from error
    return text


def read_query(text: str, images: Sequence[Image], videos: Sequence[Video]) -> Question:
    """Parse `--query` like the original `run_llava.py`: a line break follows each image, whatever the template."""
    plain = text.replace("\\n", "\n").replace("<image-placeholder>", "<image>")
    return Question(plain, images, videos, gap="\n", where="--query")


# --- standard input, --messages and --batch-file

_MEDIA_KEYS = frozenset(("image", "images", "video", "videos"))
_RECORD_KEYS = ("id", "messages", "prompt", "image", "images", "video", "videos")
_STDIN = "standard input"
_GIVE = "name media in 'images' and 'videos'; text that contains a literal marker goes into 'messages'"


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One line of a batch file: a question, or a conversation in `messages`. record: "line N" of `file`."""

    file: Path
    record: str
    id: str | int
    question: Question | None = None
    messages: tuple[Message, ...] = ()


def read_question(stream: IO[bytes]) -> str:
    """Read standard input as text and strip it. Raises DataError naming the first byte that is not UTF-8."""
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
    """Read a conversation from a JSON file: a list of messages, or an object with a list under `messages`.

    Relative media paths start at the file's directory. Raises DataError naming file, message, part and value.
    """
    content = read_json(path.expanduser())
    messages = content.get("messages") if isinstance(content, dict) else content
    if unread := sorted(_MEDIA_KEYS & content.keys()) if isinstance(content, dict) else []:
        # Training data lists media next to the messages; a conversation has them in its content parts.
        raise DataError("media outside of the messages", file=path, field=unread[0], hint="move them into the content")
    if not isinstance(messages, list) or not messages:
        raise DataError("no messages", file=path, expected="[{...}, ...] or {'messages': [{...}, ...]}")
    try:
        return _read_conversation(messages, path.parent, num_frames)
    except DataError as error:
        error.within(path)
        raise


def read_prompt_records(path: Path, num_frames: int | None = None) -> list[PromptRecord]:
    """Read every line of a batch file; empty lines are skipped. Raises DataError naming file, line and field."""
    records = []
    for number, content in read_jsonl(path.expanduser()):
        try:
            records.append(_prompt_record(content, number, path, num_frames))
        except DataError as error:
            error.within(path, f"line {number}")
            raise
    if not records:
        raise DataError("no lines", file=path, expected="one JSON object per line")
    return records


def _prompt_record(content: Any, number: int, path: Path, num_frames: int | None) -> PromptRecord:
    if not isinstance(content, dict):
        raise DataError(value=content, expected="an object")
    for key in content:
        if key not in _RECORD_KEYS:
            near = near_names(key, _RECORD_KEYS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(_RECORD_KEYS)}"
            raise DataError(f"unknown key {key!r}", field=key, hint=hint)
    identity = content.get("id", number)
    if not isinstance(identity, (str, int)) or isinstance(identity, bool):
        raise DataError(field="id", value=identity, expected="a string or an integer")
    if ("messages" in content) == ("prompt" in content):
        raise DataError("expected either 'messages' or 'prompt'")
    record, folder = f"line {number}", path.parent
    if "messages" in content:
        if extra := sorted(content.keys() - {"id", "messages"}):
            raise DataError(
                f"{extra[0]!r} is only supported with 'prompt'", field=extra[0], hint="put media into the messages"
            )
        messages = _read_conversation(content["messages"], folder, num_frames)
        return PromptRecord(path, record, identity, messages=messages)
    prompt = content["prompt"]
    if not isinstance(prompt, str):
        raise DataError(field="prompt", value=prompt, expected="a string")
    images = [Image(below(folder, name)) for name in _names(content, "image", "images")]
    videos = [Video(below(folder, name), num_frames) for name in _names(content, "video", "videos")]
    if not (prompt.strip() or images or videos):
        raise DataError("the question is empty", field="prompt", value=prompt)
    return PromptRecord(path, record, identity, Question(prompt, images, videos, where="prompt", give=_GIVE))


def _read_conversation(messages: Any, folder: Path, num_frames: int | None) -> tuple[Message, ...]:
    """Build the messages of a file. Raises DataError if the last user message has neither text nor media."""
    built = parse_messages(messages, read=_media_reader(folder, num_frames))
    if built and built[-1].role == "user" and all(_is_blank(part) for part in built[-1].parts):
        raise DataError("the question is empty", field="messages", hint=f"write it into message {len(built)}")
    return built


def _is_blank(part: Part) -> bool:
    return isinstance(part, Text) and not part.text.strip()


def _names(content: Mapping[str, Any], one: str, several: str) -> Iterator[str]:
    if one in content and several in content:
        raise DataError(f"both {one!r} and {several!r}", field=one, hint=f"put all into {several!r}")
    key = several if several in content else one
    value = content.get(key)
    names: Sequence[Any] = [] if value is None else value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not name:
            raise DataError(field=key, value=name, expected="a file name")
        yield name


def below(folder: Path, name: str) -> Path | str:
    """Return a URL as it is, and a relative path below `folder`."""
    source = media_path(name)
    return folder / source if isinstance(source, Path) else source


def _media_reader(folder: Path, num_frames: int | None) -> Callable[[Mapping[str, Any], str], Image | Video]:
    """Return a reader of content parts: relative paths below `folder`, videos with `--num-video-frames` frames."""

    def read(part: Mapping[str, Any], where: str) -> Image | Video:
        medium = read_media(part, where)
        if isinstance(medium.source, Path):
            medium = replace(medium, source=below(folder, str(medium.source)))
        if isinstance(medium, Video) and medium.num_frames is None:
            medium = replace(medium, num_frames=num_frames)
        return medium

    return read
