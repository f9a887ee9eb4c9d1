"""Flags of the original `run_llava.py` and `run_vila.py`, which `vila run` accepts with dashes or underscores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import typer

from vila.core.errors import ConfigError


@dataclass(frozen=True)
class UpstreamOptions:
    """Flags of the original scripts. None and empty strings are flags that were not given."""

    panel: ClassVar = "Flags of the original run_llava.py (dashes or underscores)"

    model_path: Annotated[str, typer.Option("--model-path", "--model-name")] = ""
    """Alias of MODEL."""
    conv_mode: str = ""
    """Alias of --template."""
    query: str | None = None
    """Like --prompt, with \\n for a line break. Without <image> markers, images precede the text."""
    image_file: str | None = None
    """Image paths or URLs, separated by --sep."""
    sep: str = ","
    """Separator of --image-file."""
    video_file: str | None = None
    """Alias of --video."""
    num_beams: int = 1
    """Only 1 is supported; there is no beam search."""
    load_4bit: Annotated[bool, typer.Option("--load-4bit")] = False
    """Not supported."""
    load_8bit: Annotated[bool, typer.Option("--load-8bit")] = False
    """Not supported."""

    def check(self) -> None:
        """Raise ConfigError for features of the original that are not supported."""
        if self.num_beams != 1:
            raise ConfigError(
                "beam search is not supported",
                field="--num-beams",
                value=self.num_beams,
                hint="leave it out, or sample with --temperature",
            )
        for field, given, bits in (("--load-4bit", self.load_4bit, 4), ("--load-8bit", self.load_8bit, 8)):
            if given:
                hint = "leave it out; --dtype bfloat16 takes 16 bits per weight, vila quantize writes an INT4 model"
                raise ConfigError(f"loading in {bits} bits (bitsandbytes) is not supported", field=field, hint=hint)

    def images(self) -> list[str]:
        """Return the names in `--image-file`. Raises ConfigError for an empty name or separator."""
        if self.image_file is None:
            return []
        if not self.sep:
            raise ConfigError("empty", field="--sep", hint="give the text that separates the names in --image-file")
        names = [name.strip() for name in self.image_file.split(self.sep)]
        if not all(names):
            raise ConfigError(f"an empty name next to {self.sep!r}", field="--image-file", value=self.image_file)
        return names


def same_value(ours: str, our_value: str, theirs: str, their_value: str) -> str:
    """Return the value of a setting with two flags. Raises ConfigError if both are given with different values."""
    if our_value and their_value and our_value != their_value:
        hint = f"{theirs} is {their_value!r}; give one of them"
        raise ConfigError("set twice", field=ours, value=our_value, hint=hint)
    return our_value or their_value
