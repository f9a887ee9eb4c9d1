"""Example images of the demo, drawn with Pillow and thus under this project's licence (Apache-2.0).

Models trained on easy-VQA get coloured shapes; other models a chart, a sign, dice and a clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vila.core.files import atomic_path
from vila.serve.demo.client import FewShotExample

_EASY = ("easy-vqa", "easy_vqa", "starter", "quickstart")
Draw = Callable[[], Image.Image]


@dataclass(frozen=True, slots=True)
class Example:
    """An example image with a question about it."""

    name: str
    question: str
    draw: Draw


def gallery_for(words: str) -> list[Example]:
    """Return the examples for models whose names and model cards are `words`."""
    return SHAPES if any(name in words.lower() for name in _EASY) else SCENES


def save_images(examples: Sequence[Example], folder: Path) -> list[tuple[str, str]]:
    """Draw the images into a directory; return pairs of path and question."""
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for example in examples:
        path = folder / f"{example.name}.png"
        if not path.exists():
            with atomic_path(path) as part:
                example.draw().save(part, "PNG")
        out.append((str(path), example.question))
    return out


def worked_examples(words: str, folder: Path) -> dict[str, list[FewShotExample]]:
    """Return named sets of few-shot examples with drawn images (in-context learning, as in VILA's demo)."""
    folder.mkdir(parents=True, exist_ok=True)

    def draw_image(name: str, draw: Draw) -> str:
        return save_images([Example(name, "", draw)], folder)[0][0]

    if gallery_for(words) is SHAPES:
        red = draw_image("shot_red_circle", lambda: shape("circle", "red", 0.5, 0.45))
        blue = draw_image("shot_blue_triangle", lambda: shape("triangle", "blue", 0.45, 0.55))
        return {
            "Colour": [FewShotExample(red, "red"), FewShotExample(blue, "blue")],
            "Shape": [FewShotExample(red, "circle"), FewShotExample(blue, "triangle")],
        }
    two = draw_image("shot_two", lambda: dice(2))
    five = draw_image("shot_five", lambda: dice(5))
    stop = draw_image("shot_stop", lambda: sign("STOP", "#b3261e"))
    open_ = draw_image("shot_open", lambda: sign("OPEN", "#1b6e3c"))
    return {
        "Counting": [FewShotExample(two, "2 dots"), FewShotExample(five, "5 dots")],
        "Reading": [FewShotExample(stop, "STOP"), FewShotExample(open_, "OPEN")],
        "Style": [
            FewShotExample(stop, "A red sign halts the road; the wheels fall silent."),
            FewShotExample(open_, "A green door greets the street; come in, it says."),
        ],
    }


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


def dice(dots: int) -> Image.Image:
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


def clock(hour: int, minute: int) -> Image.Image:
    """Draw an analogue clock."""
    image = Image.new("RGB", (320, 320), "#efe7da")
    pen = ImageDraw.Draw(image)
    pen.ellipse((30, 30, 290, 290), "white", "#333333", 6)
    for number in range(1, 13):
        angle = math.pi * number / 6
        pen.text(
            (160 + 104 * math.sin(angle), 160 - 104 * math.cos(angle)),
            str(number),
            "black",
            ImageFont.load_default(24),
            anchor="mm",
        )
    for fraction, length, width in (((hour % 12 + minute / 60) / 12, 60, 9), (minute / 60, 90, 5)):
        angle = 2 * math.pi * fraction
        pen.line((160, 160, 160 + length * math.sin(angle), 160 - length * math.cos(angle)), "#222222", width)
    return image


SHAPES = [
    Example("red_circle", "what shape is in the image?", lambda: shape("circle", "red", 0.55, 0.5)),
    Example("green_rectangle", "what color is the shape?", lambda: shape("rectangle", "green", 0.45, 0.55)),
    Example("blue_triangle", "is there a triangle?", lambda: shape("triangle", "blue", 0.5, 0.45)),
    Example("yellow_circle", "is there a red shape?", lambda: shape("circle", "yellow", 0.4, 0.6)),
    Example("brown_triangle", "what shape does the image contain?", lambda: shape("triangle", "brown", 0.6, 0.5)),
    Example("teal_rectangle", "what is the color of the shape?", lambda: shape("rectangle", "teal", 0.5, 0.5)),
]
SCENES = [
    Example("chart", "Which month had the most rain, and how much?", chart),
    Example("sign", "What does the sign say?", lambda: sign("SALE", "#7a2d8c")),
    Example("die", "How many dots are on the die?", lambda: dice(6)),
    Example("clock", "What time is it?", lambda: clock(10, 10)),
    Example("disc", "Describe the image in one sentence.", lambda: shape("circle", "red", 0.5, 0.5, 240)),
]
