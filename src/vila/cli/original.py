"""The flags of the original's `run_llava.py` and `run_vila.py`, and what its `--query` means by its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from vila.cli.conversation import Question
from vila.core.errors import ConfigError
from vila.core.types import Image, Video

_PANEL = "As the original spells it (underscores do as well)"

ModelPath = Annotated[
    str, typer.Option("--model-path", "--model-name", help="= MODEL", show_default=False, rich_help_panel=_PANEL)
]
ModelBase = Annotated[str, typer.Option(help="= --base", show_default=False, rich_help_panel=_PANEL)]
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
