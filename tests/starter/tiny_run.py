"""Test fixtures of the quickstart: tiny components in the real layouts and a small easy-VQA directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import AutoModel, AutoModelForCausalLM

from tests import tiny
from vila.starter.easy_vqa import COLOURS, SHAPES

RGB = {
    "black": (0, 0, 0), "blue": (0, 0, 255), "brown": (150, 75, 0), "gray": (128, 128, 128),
    "green": (0, 150, 0), "red": (255, 0, 0), "teal": (0, 128, 128), "yellow": (255, 255, 0),
}  # fmt: skip


def write_llm(folder: Path) -> Path:
    """A tiny LLM with its tokenizer."""
    torch.manual_seed(0)
    config = tiny.text_config("llama", max_position_embeddings=4096, initializer_range=0.05)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def write_vision(folder: Path) -> Path:
    """A tiny DINOv2."""
    torch.manual_seed(0)
    AutoModel.from_config(tiny.vision_config("dinov2")).save_pretrained(folder)
    return folder


def write_easy_vqa(folder: Path, train: int = 60, test: int = 8) -> Path:
    """Images of one shape with the questions of the real set's wordings."""
    for split, count in (("train", train), ("test", test)):
        images = folder / split / "images"
        images.mkdir(parents=True)
        rows = []
        for number in range(count):
            shape, colour = SHAPES[number % 3], COLOURS[(number * 5 + number // 8) % 8]
            _draw(shape, colour).save(images / f"{number}.png")
            other = SHAPES[(number + 1) % 3]
            rows += [
                ["what shape is in the image?", shape, number],
                ["what color is the shape?", colour, number],
                [f"is there a {shape}?", "yes", number],
                [f"is there not a {other}?", "yes", number],
                [f"is a {colour} shape present?", "yes", number],
            ]
        (folder / split / "questions.json").write_text(json.dumps(rows))
    return folder


def _draw(shape: str, colour: str) -> Image.Image:
    image = Image.new("RGB", (64, 64), (220, 230, 240))
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((16, 16, 48, 48), fill=RGB[colour])
    elif shape == "rectangle":
        draw.rectangle((12, 20, 52, 44), fill=RGB[colour])
    else:
        draw.polygon([(32, 12), (52, 50), (12, 50)], fill=RGB[colour])
    return image
