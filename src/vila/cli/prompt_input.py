"""From what was typed to the messages that the engine is asked with."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import typer
from typer.core import TyperCommand

from vila.cli.options import image_of, opened
from vila.core.errors import ConfigError, MediaError, near_names
from vila.core.types import Image, Message, Part, Text, Video

# --- shots
# `--shot`: worked examples before the question, written in several words.


KEYS = ("image", "question", "text")
_FORM = 'write --shot image=a.png text="a circle", with question=... where it is another one'
_WORD = re.compile(r"\w+=")
_INNER = re.compile(r"\s(\w+)=")
_BORDER = re.compile(rf"\s+(?=(?:{'|'.join(KEYS)})=)")
# Stands between the words of a shot after folding; nobody types it.
_SEPARATOR = "\x1f"


@dataclass(frozen=True, slots=True)
class Shot:
    """An example: `text` is the answer; without a `question` it answers the one that follows the examples."""

    text: str
    image: Image | None = None
    question: str | None = None


class ShotCommand(TyperCommand):
    """A command whose `--shot` takes all `key=value` words that follow it."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Fold, then parse as ever."""
        return super().parse_args(ctx, fold_words(args))


def fold_words(arguments: Sequence[str]) -> list[str]:
    """The arguments with each `--shot` and its `key=value` words made one argument; what follows `--` stays."""
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
    """A shot from the value of its option. Raises ConfigError for what is missing, doubled or unknown."""
    words = option.split(_SEPARATOR)
    where = f"--shot {' '.join(words)}"
    if len(words) == 1:
        words = _BORDER.split(option.strip())
        if words[0].startswith("image=") and (unknown := _INNER.search(words[0])):
            raise _unknown(where, unknown[1])
    fields = _fields(where, words)
    if not fields.get("text", "").strip():
        raise ConfigError(f"{where}: no text, which is the answer to learn from; {_FORM}")
    if "image" in fields and not fields["image"]:
        raise ConfigError(f"{where}: image= names no file; leave it out for an example without a picture")
    image = image_of(fields["image"]) if "image" in fields else None
    return Shot(fields["text"], image, fields.get("question"))


def with_opened(shots: Sequence[Shot]) -> list[Shot]:
    """The examples with their pictures decoded. Raises MediaError for one that cannot be."""
    return [shot if shot.image is None else replace(shot, image=opened(shot.image)) for shot in shots]


def _fields(where: str, words: Sequence[str]) -> Mapping[str, str]:
    fields: dict[str, str] = {}
    for word in words:
        if not _WORD.match(word):
            raise ConfigError(f"{where}: {word!r} is not of the form key=value; {_FORM}")
        key, _, value = word.partition("=")
        if key not in KEYS:
            raise _unknown(where, key)
        if key in fields:
            raise ConfigError(f"{where}: {key}= is given twice; each example has a --shot of its own")
        fields[key] = value
    return fields


def _unknown(where: str, key: str) -> ConfigError:
    near = near_names(key, KEYS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"{where}: unknown key {key!r} (known: {', '.join(KEYS)}){hint}; {_FORM}")


_IMAGE, _VIDEO = "<image>", "<video>"
_MARKERS = re.compile(f"({_IMAGE}|{_VIDEO})")


@dataclass(frozen=True, slots=True)
class Question:
    """The last turn of a conversation.

    gap:   written after each image that is put before the text; None takes the template's.
    where: name of the text in an error.
    give:  how to give media, for the error for markers without any.
    """

    text: str
    images: Sequence[Image] = ()
    videos: Sequence[Video] = ()
    gap: str | None = None
    where: str = "--prompt"
    give: str = "pass --image FILE or --video FILE; text that spells a marker goes into --messages, as a text part"


def build_conversation(
    question: Question, gap: str, *, shots: Sequence[Shot] = (), system: str | None = None
) -> tuple[Message, ...]:
    """System text, examples, question. `gap` is the template's `media_gap`.

    Raises MediaError when markers in a text and the media for it differ in number.
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
    """Return the parts of a user's turn: media where the text has markers for them, else before the text.

    Raises MediaError with both counts if markers and media differ in number.
    """
    text = question.text
    found = {_IMAGE: text.count(_IMAGE), _VIDEO: text.count(_VIDEO)}
    if not any(found.values()):
        # The processor writes the gaps of a clip, frame by frame.
        before = [part for image in question.images for part in (image, Text(gap))]
        return _joined([*before, *question.videos, Text(text)])
    problems = [
        f"{_count(found[marker], f'{marker} marker')} but {_count(len(given), what)}"
        for marker, given, what in ((_IMAGE, question.images, "image"), (_VIDEO, question.videos, "video"))
        if found[marker] != len(given)
    ]
    if problems:
        has_media = bool(question.images or question.videos)
        raise MediaError(
            f"{', and '.join(problems)} given",
            field=question.where,
            hint="write a marker for each, or none to have them first" if has_media else question.give,
        )
    waiting: dict[str, Iterator[Part]] = {_IMAGE: iter(question.images), _VIDEO: iter(question.videos)}
    return _joined([next(waiting[piece]) if piece in waiting else Text(piece) for piece in _MARKERS.split(text)])


def _joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Neighbouring texts made one, empty ones left out."""
    out: list[Part] = []
    for part in parts:
        if isinstance(part, Text) and out and isinstance(out[-1], Text):
            out[-1] = Text(out[-1].text + part.text)
        else:
            out.append(part)
    return tuple(part for part in out if not (isinstance(part, Text) and not part.text))


def with_system(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    """The conversation with `--system` before it. Raises ConfigError when it has a system message of its own."""
    if system is None:
        return tuple(messages)
    if messages and messages[0].role == "system":
        raise ConfigError("--system was given, but the messages begin with a system message; leave one of them out")
    return (Message.of("system", check_text(system, "the system text")), *messages)


def check_text(text: str, where: str) -> str:
    """The text itself. Raises ConfigError for what is no text: bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: not UTF-8 text (character {error.start + 1} is {text[error.start]!r})") from error
    return text


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# --- original
# The flags of the original's `run_llava.py` and `run_vila.py`, and what its `--query` means by its text.


_PANEL = "As the original spells it (underscores do as well)"

ModelPath = Annotated[
    str, typer.Option("--model-path", "--model-name", help="= MODEL", show_default=False, rich_help_panel=_PANEL)
]
ConvMode = Annotated[str, typer.Option(help="= --template", show_default=False, rich_help_panel=_PANEL)]
Query = Annotated[
    str | None,
    typer.Option(
        help="= --prompt; \\n is a line break; without <image>, one and a line break go before it for each picture.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
ImageFile = Annotated[
    str | None, typer.Option(help="Pictures, joined by --sep.", show_default=False, rich_help_panel=_PANEL)
]
Sep = Annotated[str, typer.Option(help="What joins --image-file.", rich_help_panel=_PANEL)]
VideoFile = Annotated[str | None, typer.Option(help="= --video", show_default=False, rich_help_panel=_PANEL)]
NumBeams = Annotated[int, typer.Option(help="Only 1: beams are not supported.", rich_help_panel=_PANEL)]
Load4bit = Annotated[bool, typer.Option("--load-4bit", help="Not supported.", rich_help_panel=_PANEL)]
Load8bit = Annotated[bool, typer.Option("--load-8bit", help="Not supported.", rich_help_panel=_PANEL)]


def refuse_unsupported(num_beams: int, load_4bit: bool, load_8bit: bool) -> None:
    """Raises ConfigError for what the original can do and this cannot: going on would answer something else."""
    if num_beams != 1:
        raise ConfigError(
            f"--num-beams {num_beams}: beam search is not supported, answers grow token by token; leave it out, "
            "or draw with --temperature"
        )
    for name, wanted, bits in (("--load-4bit", load_4bit, 4), ("--load-8bit", load_8bit, 8)):
        if wanted:
            raise ConfigError(
                f"{name}: loading in {bits} bits (bitsandbytes) is not supported; leave it out "
                "(--dtype bfloat16 takes 16 bits a number)"
            )


def one_of(ours: str, our_value: str, theirs: str, their_value: str) -> str:
    """The value of a flag that has two names. Raises ConfigError when they were given different ones."""
    if our_value and their_value and our_value != their_value:
        raise ConfigError(f"{ours} is {our_value!r} but {theirs} is {their_value!r}; give one of them")
    return our_value or their_value


def split_files(files: str | None, sep: str) -> list[str]:
    """The names in `--image-file`. Raises ConfigError when one of them is empty."""
    if files is None:
        return []
    if not sep:
        raise ConfigError("--sep is empty; give the text that joins the names in --image-file")
    names = [name.strip() for name in files.split(sep)]
    if not all(names):
        raise ConfigError(f"--image-file {files!r}: a name between {sep!r} is empty; give names joined by --sep")
    return names


def read_query(text: str, images: Sequence[Image], videos: Sequence[Video]) -> Question:
    """`--query` as the original understands it: with a line break after each picture, whatever the template."""
    plain = text.replace("\\n", "\n").replace("<image-placeholder>", "<image>")
    return Question(plain, images, videos, gap="\n", where="--query")
