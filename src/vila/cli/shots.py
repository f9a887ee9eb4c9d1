"""`--shot`: worked examples before the question, written in several words.

    --shot image=a.png text="a circle" --shot image=b.png question="Which shape?" text="a square"

A shell hands such words over one by one, and quoted together they are one: `--shot "image=a.png text=a circle"`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import typer
from typer.core import TyperCommand

from vila.cli.media import image_of, opened
from vila.core.errors import ConfigError, near_names
from vila.core.types import Image

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
