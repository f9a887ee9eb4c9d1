"""Models and conversations shared by the tests of the engine."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from tests import tiny
from vila.core.types import Message
from vila.engine.engine import Engine

# Shorter than the prompts, so that the first tokens leave the window while an answer grows.
_WINDOW = 9
MODELS: dict[str, dict[str, Any]] = {
    **{family: {"family": family} for family in tiny.FAMILIES},
    "mistral, sliding window": {"family": "mistral", "sliding_window": _WINDOW},
    "qwen2, one layer with a sliding window": {
        "family": "qwen2",
        "use_sliding_window": True,
        "sliding_window": _WINDOW,
        "max_window_layers": 1,
    },
}
"""Every family, and the kinds of attention that its config may select."""


def endless(name: str = "llama", **changes: Any) -> Engine:
    """Return an engine without stop tokens, because random models stop at once or never."""
    engine = Engine(*tiny.vila(**{**MODELS[name], **changes}))
    engine._stop_ids = frozenset()
    return engine


def ask(text: str, *images: int) -> list[Message]:
    """Return a question about images, by their seeds."""
    return [Message.of("user", *(tiny.image(seed) for seed in images), text)]


QUESTIONS = [
    ask("text only"),
    ask("one?", 1),
    ask("a longer question about the same image?", 1),
    ask("again?", 1),
    ask("two images", 1, 2),
    ask("two images, exchanged", 2, 1),
    ask("the same image twice", 3, 3),
    ask("x"),
    [Message.of("user", "the first ", tiny.image(3), "?")],
    [Message.of("user", "the other ", tiny.image(3), "?")],
]
"""Different lengths and numbers of images, shared prefixes, an image twice, text before an image."""


def full_logits(engine: Engine, prompt: Any, ids: Any) -> torch.Tensor:
    """Return logits [1 + len(ids), V] of a prompt's last token and of the tokens `ids` after it, without a cache."""
    row = torch.tensor([[*prompt.ids, *ids]])
    pixels = engine.processor.pixels(prompt.media)
    with torch.no_grad():
        logits = engine.model(input_ids=row, pixel_values=pixels, use_cache=False).logits
    return logits[0, len(prompt.ids) - 1 :].float()


@cache
def sentencepiece() -> Any:
    """Return a tokenizer with a dummy prefix and byte tokens, read from a `tokenizer.model` alone."""
    return AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "golden/tokenizers/vicuna_v15_legacy_false")
