"""Example images of the demo, drawn with Pillow and thus under this project's licence (Apache-2.0).

Models trained on easy-VQA get coloured shapes; other models a chart, a sign, a die and a disc.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_EASY = ("easy-vqa", "easy_vqa", "starter", "quickstart")


@dataclass(frozen=True, slots=True)
class Example:
    """A question about a drawn image; few-shot examples have an answer too.

    draw: a function of this module and its arguments, which name the image's file.
    """

    question: str
    draw: partial[Image.Image]
    answer: str = ""

    def prompt(self, folder: Path) -> dict[str, Any]:
        """Return the question as the value of a Gradio text box; draws the image into a directory."""
        path = folder / f"{'-'.join(map(str, (self.draw.func.__name__, *self.draw.args)))}.png"
        if not path.exists():
            self.draw().save(path)
        return {"text": self.question, "files": [str(path)]}


@dataclass(frozen=True, slots=True)
class Gallery:
    """Examples for a group of models.

    few_shot: sets by name; the last example of a set is the question, those before it are answered.
    """

    examples: Sequence[Example]
    few_shot: Mapping[str, Sequence[Example]]


def gallery_for(words: str) -> Gallery:
    """Return the gallery for models whose names and model cards are `words`."""
    return SHAPES if any(name in words.lower() for name in _EASY) else SCENES


def few_shot_turns(shots: Sequence[Example], folder: Path) -> list[dict[str, Any]]:
    """Return answered examples as earlier turns of a chat (in-context learning, as in VILA's demo)."""
    turns: list[dict[str, Any]] = []
    for shot in shots:
        prompt = shot.prompt(folder)
        content = [*({"path": file} for file in prompt["files"]), prompt["text"]]
        turns += [{"role": "user", "content": content}, {"role": "assistant", "content": shot.answer}]
    return turns


COLOURS = {"red": "#dc1e1e", "blue": "#1e32d2", "green": "#14911e", "yellow": "#e6d21e", "brown": "#78461e",
           "black": "#141414", "gray": "#828282", "teal": "#148c8c"}  # fmt: skip


def shape(kind: str, colour: str, x: float, y: float, size: int = 64) -> Image.Image:
    """Draw a circle, rectangle or triangle as in easy-VQA; x and y: its centre, as fractions of the size."""
    scale = 4  # supersampling for smooth edges
    image = Image.new("RGB", (size * scale, size * scale), "#dfeae4")
    pen = ImageDraw.Draw(image)
    radius, centre = size * scale * 0.24, (x * size * scale, y * size * scale)
    left, top, right, bottom = centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius
    if kind == "circle":
        pen.ellipse((left, top, right, bottom), COLOURS[colour])
    elif kind == "rectangle":
        pen.rectangle((left, centre[1] - radius * 0.7, right, centre[1] + radius * 0.7), COLOURS[colour])
    else:
        pen.polygon([(centre[0], top), (left, bottom), (right, bottom)], COLOURS[colour])
    return image.resize((size, size), Image.Resampling.LANCZOS)


def chart() -> Image.Image:
    """Draw a bar chart of monthly rainfall."""
    image = Image.new("RGB", (480, 360), "white")
    pen = ImageDraw.Draw(image)
    pen.text((24, 16), "Rain, mm", "black", ImageFont.load_default(24))
    for index, (month, height) in enumerate({"Jan": 80, "Feb": 55, "Mar": 120, "Apr": 95, "May": 40}.items()):
        left = 48 + index * 84
        pen.rectangle((left, 310 - height * 2, left + 52, 310), "#2f6fb0")
        pen.text((left + 6, 318), month, "black", ImageFont.load_default(20))
        pen.text((left + 10, 284 - height * 2), str(height), "black", ImageFont.load_default(18))
    pen.line((36, 310, 462, 310), "black", 2)
    return image


def sign(words: str, colour: str) -> Image.Image:
    """Draw a sign with white text."""
    image = Image.new("RGB", (480, 300), "#c9d6df")
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle((40, 60, 440, 220), 24, colour, "white", 6)
    pen.rectangle((228, 220, 252, 300), "#6b6b6b")
    pen.text((240, 140), words, "white", ImageFont.load_default(72), anchor="mm")
    return image


def die(dots: int) -> Image.Image:
    """Draw the face of a die with 1 to 6 dots."""
    cells = {1: "e", 2: "ai", 3: "aei", 4: "acgi", 5: "acegi", 6: "acdfgi"}[dots]
    image = Image.new("RGB", (300, 300), "#3f7a5b")
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle((50, 50, 250, 250), 28, "#fbfbf5")
    for letter in cells:
        row, column = divmod(ord(letter) - ord("a"), 3)
        x, y = 95 + column * 55, 95 + row * 55
        pen.ellipse((x - 17, y - 17, x + 17, y + 17), "#1d1d1d")
    return image


_COLOUR, _KIND = "what color is the shape?", "what shape is in the image?"
_DOTS, _READ, _DESCRIBE = "How many dots are on the die?", "What does the sign say?", "Describe the sign."
_CIRCLE, _TRIANGLE = partial(shape, "circle", "red", 0.55, 0.5), partial(shape, "triangle", "blue", 0.5, 0.45)
_RECTANGLE, _TEAL = partial(shape, "rectangle", "green", 0.45, 0.55), partial(shape, "rectangle", "teal", 0.5, 0.5)
_STOP, _OPEN, _SALE = (
    partial(sign, "STOP", "firebrick"),
    partial(sign, "OPEN", "seagreen"),
    partial(sign, "SALE", "purple"),
)
SHAPES = Gallery(
    [
        Example(_KIND, _CIRCLE),
        Example(_COLOUR, _RECTANGLE),
        Example("is there a triangle?", _TRIANGLE),
        Example("is there a red shape?", partial(shape, "circle", "yellow", 0.4, 0.6)),
        Example("what shape does the image contain?", partial(shape, "triangle", "brown", 0.6, 0.5)),
        Example("what is the color of the shape?", _TEAL),
    ],
    {
        "Colour": [Example(_COLOUR, _CIRCLE, "red"), Example(_COLOUR, _TRIANGLE, "blue"), Example(_COLOUR, _TEAL)],
        "Shape": [Example(_KIND, _CIRCLE, "circle"), Example(_KIND, _TRIANGLE, "triangle"), Example(_KIND, _TEAL)],
    },
)
SCENES = Gallery(
    [
        Example("Which month had the most rain, and how much?", partial(chart)),
        Example(_READ, _SALE),
        Example(_DOTS, partial(die, 6)),
        Example("Describe the image in one sentence.", partial(shape, "circle", "red", 0.5, 0.5, 240)),
    ],
    {
        "Counting": [
            Example(_DOTS, partial(die, 2), "2 dots"),
            Example(_DOTS, partial(die, 5), "5 dots"),
            Example(_DOTS, partial(die, 3)),
        ],
        "Reading": [Example(_READ, _STOP, "STOP"), Example(_READ, _OPEN, "OPEN"), Example(_READ, _SALE)],
        "Style": [
            Example(_DESCRIBE, _STOP, "A red sign halts the road; the wheels fall silent."),
            Example(_DESCRIBE, _OPEN, "A green door greets the street; come in, it says."),
            Example(_DESCRIBE, _SALE),
        ],
    },
)
