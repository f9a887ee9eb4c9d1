"""Diagnostics of a starter model: use of the image (captions, swapped images) and perplexity of plain text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from vila.core.types import Image, Message
from vila.engine.engine import Engine
from vila.eval.benchmark import Item
from vila.eval.benchmarks.easy_vqa import EasyVqa
from vila.starter.data import ShapeImage, caption

_BATCH = 32
_WINDOW = 1800
"""Characters of a perplexity window: about 400 tokens of English."""


def caption_nll(engine: Engine, captioned: Sequence[ShapeImage], images: Path) -> dict[str, float]:
    """Return the mean negative log-likelihood per caption token, with the own image and with a different one."""
    return {
        "right": _nll(engine, [(image, image.image_id) for image in captioned], images),
        "swapped": _nll(engine, [(image, _other(captioned, number)) for number, image in enumerate(captioned)], images),
    }


def _other(captioned: Sequence[ShapeImage], number: int) -> int:
    """Return the next image that differs in shape and colour."""
    own = captioned[number]
    for step in range(1, len(captioned)):
        other = captioned[(number + step) % len(captioned)]
        if other.shape != own.shape and other.colour != own.colour:
            return other.image_id
    raise ValueError("all images have the same shape or colour")


def _nll(engine: Engine, pairs: Sequence[tuple[ShapeImage, int]], images: Path) -> float:
    scores: list[float] = []
    for start in range(0, len(pairs), _BATCH):
        conversations = [
            [Message.of("user", Image(images / f"{image_id}.png")), Message.of("assistant", caption(captioned))]
            for captioned, image_id in pairs[start : start + _BATCH]
        ]
        for logprobs in engine.score(conversations, template="caption"):
            scores += logprobs
    return -fmean(scores)


def perplexity(engine: Engine, text: str, tokens: int) -> dict[str, float]:
    """Return the perplexity of plain text, computed in windows until at least `tokens` tokens are scored."""
    scores: list[float] = []
    for window in _windows(text):
        # The `page` template supervises the full text and an end-of-sequence token, which is left out here.
        scores += engine.score([[Message.of("user", window)]], template="page")[0][:-1]
        if len(scores) >= tokens:
            break
    return {"tokens": len(scores), "perplexity": math.exp(-fmean(scores))}


def _windows(text: str) -> list[str]:
    windows: list[str] = []
    for paragraph in text.split("\n\n"):
        if windows and len(windows[-1]) + len(paragraph) < _WINDOW:
            windows[-1] += "\n\n" + paragraph
        else:
            windows.append(paragraph)
    return windows


class SwappedEasyVqa(EasyVqa):
    """easy-VQA with swapped images: each group of questions is asked about the image of the next group."""

    name = "easy_vqa_swapped"

    def __init__(self, folder: Path, limit: int = 0, split: str = "test") -> None:
        super().__init__(folder, limit, split)
        groups = list(dict.fromkeys(item.group for item in self._items))
        images = {item.group: item.messages[0].parts[0] for item in self._items}
        swapped = {group: images[groups[(number + 1) % len(groups)]] for number, group in enumerate(groups)}
        self._items = [_with_image(item, swapped[item.group]) for item in self._items]


def _with_image(item: Item, image: Any) -> Item:
    first = item.messages[0]
    return replace(item, messages=(replace(first, parts=(image, *first.parts[1:])), *item.messages[1:]))
