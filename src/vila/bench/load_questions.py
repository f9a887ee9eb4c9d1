"""Questions for a load run: stretches of packaged English, with drawn pictures; no two begin alike."""

from __future__ import annotations

import base64
import io
import random
from typing import Any

from PIL import Image

from vila.bench.load import Question
from vila.core.errors import ConfigError
from vila.quant.calibrate import packaged_documents

_TOKENS_A_WORD = 1.35


def questions(
    count: int, *, prompt_tokens: int, max_tokens: int, images: int = 0, image_size: int = 224, seed: int = 0
) -> list[Question]:
    """`count` questions of about `prompt_tokens` tokens of text (the server counts them) and `images` pictures each.

    A stretch begins at a random word, so that a cache of prefixes does not answer for the model.
    Raises ConfigError for lengths that are none.
    """
    if prompt_tokens < 1 or max_tokens < 1 or images < 0 or count < 1:
        raise ConfigError(
            f"{count} questions of {prompt_tokens} tokens, {images} images, {max_tokens} new: from 1 (images 0)"
        )
    draw = random.Random(seed)
    words = " ".join(document for document in packaged_documents() if isinstance(document, str)).split()
    length = max(1, round(prompt_tokens / _TOKENS_A_WORD))
    out = []
    for _ in range(count):
        start = draw.randrange(len(words))
        text = " ".join((words[start:] + words * (1 + length // len(words)))[:length])
        out.append(Question([{"role": "user", "content": _content(text, images, image_size, draw)}], max_tokens))
    return out


def _content(text: str, images: int, size: int, draw: random.Random) -> Any:
    if not images:
        return text
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": _picture(size, draw)}} for _ in range(images)
    ]
    return [*parts, {"type": "text", "text": text}]


def _picture(size: int, draw: random.Random) -> str:
    """Sixteen coloured squares, as a PNG in a `data:` URL."""
    small = Image.new("RGB", (4, 4))
    for x in range(4):
        for y in range(4):
            small.putpixel((x, y), (draw.randrange(256), draw.randrange(256), draw.randrange(256)))
    buffer = io.BytesIO()
    small.resize((size, size), Image.Resampling.NEAREST).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
