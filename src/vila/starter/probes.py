"""Small measurements of a starter model: does it look at the picture, does it still know its language."""

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


def caption_nll(engine: Engine, truths: Sequence[ShapeImage], images: Path) -> dict[str, float]:
    """Mean negative log-likelihood per caption token: with the right picture, and with one of another truth."""
    return {
        "right": _nll(engine, [(truth, truth.image_id) for truth in truths], images),
        "swapped": _nll(engine, [(truth, _other(truths, place)) for place, truth in enumerate(truths)], images),
    }


def _other(truths: Sequence[ShapeImage], place: int) -> int:
    """The next picture that differs in shape and colour."""
    own = truths[place]
    for step in range(1, len(truths)):
        other = truths[(place + step) % len(truths)]
        if other.shape != own.shape and other.colour != own.colour:
            return other.image_id
    raise ValueError("all pictures show the same shape or colour")


def _nll(engine: Engine, pairs: Sequence[tuple[ShapeImage, int]], images: Path) -> float:
    scores: list[float] = []
    for start in range(0, len(pairs), _BATCH):
        conversations = [
            [Message.of("user", Image(images / f"{image_id}.png")), Message.of("assistant", caption(truth))]
            for truth, image_id in pairs[start : start + _BATCH]
        ]
        for logprobs in engine.score(conversations, template="caption"):
            scores += logprobs
    return -fmean(scores)


def perplexity(engine: Engine, text: str, tokens: int) -> dict[str, float]:
    """Perplexity of plain text in windows, over at least `tokens` tokens when the text has them."""
    scores: list[float] = []
    for window in _windows(text):
        # The `page` template supervises all of a text; the end of sequence that it adds is not part of ours.
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
    """easy-VQA whose pictures are exchanged: every group of questions is asked about the next group's picture."""

    name = "easy_vqa_swapped"

    def __init__(self, folder: Path, limit: int = 0, split: str = "test") -> None:
        super().__init__(folder, limit, split)
        groups = list(dict.fromkeys(item.group for item in self._items))
        pictures = {item.group: item.messages[0].parts[0] for item in self._items}
        nxt = {group: pictures[groups[(place + 1) % len(groups)]] for place, group in enumerate(groups)}
        self._items = [_with_picture(item, nxt[item.group]) for item in self._items]


def _with_picture(item: Item, picture: Any) -> Item:
    first = item.messages[0]
    return replace(item, messages=(replace(first, parts=(picture, *first.parts[1:])), *item.messages[1:]))
