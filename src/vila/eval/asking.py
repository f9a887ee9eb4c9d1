"""Asking an engine or a server for the answers to a batch of questions: whatever fails costs its own answer alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from vila.core.errors import ContextOverflowError
from vila.core.types import Message
from vila.core.vision_spec import ImageMode
from vila.engine.request import Sampling
from vila.eval.benchmark import Item

_LEAST_NEW_TOKENS = 32


class Answers(Protocol):
    """Whatever answers conversations: our engine, or a server."""

    def generate_batch(
        self, conversations: Sequence[Sequence[Message]], sampling: Sampling, *, template: str = ""
    ) -> list[str]:
        """The answers, in the order of the conversations."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of prompts, slots of pictures included, and of answers."""

    prompt: int = 0
    new: int = 0


class Asking:
    """Asks what answers, and counts its tokens.

    tokens: of all answers so far; None when whatever answers does not count them.
    """

    def __init__(self, engine: Answers, *, exif_orientation: bool | None = None) -> None:
        """exif_orientation: whether images are turned upright; None leaves that to the engine."""
        if exif_orientation is not None and hasattr(engine, "with_vision"):
            engine = engine.with_vision(exif_orientation=exif_orientation)
        self._engines: dict[ImageMode | None, Answers] = {None: engine}
        self._of_generations = Tokens()

    def __call__(self, batch: Sequence[Item], sampling: Sampling, template: str = "") -> list[str | Exception]:
        """The answers of a batch; an exception for each question that cannot be answered even alone.

        batch: of one template and one image mode. template: of items that name none.
        """
        try:
            return list(self._texts(batch, sampling, batch[0].template or template))
        except ContextOverflowError as error:
            # The benchmark's room for an answer is far more than answers take; a small context holds less of it.
            if len(batch) == 1 and sampling.max_new_tokens > _LEAST_NEW_TOKENS:
                return self(batch, replace(sampling, max_new_tokens=sampling.max_new_tokens // 2), template)
            if len(batch) == 1:
                return [error]
        except Exception as error:  # noqa: BLE001 - recorded with the question that it belongs to
            if len(batch) == 1:
                return [error]
        return [result for item in batch for result in self([item], sampling, template)]

    @property
    def tokens(self) -> Tokens | None:
        """See the class."""
        engine: Any = self._engines[None]
        if hasattr(engine, "complete"):
            return self._of_generations
        counted = Tokens(getattr(engine, "prompt_tokens", 0), getattr(engine, "reply_tokens", 0))
        return counted if counted.new else None

    def _texts(self, batch: Sequence[Item], sampling: Sampling, template: str) -> list[str]:
        engine: Any = self._of_mode(batch[0].image_mode)
        conversations = [item.messages for item in batch]
        if not hasattr(engine, "complete"):
            return [_writable(text) for text in engine.generate_batch(conversations, sampling, template=template)]
        found = engine.complete(conversations, sampling, template=template)
        before = self._of_generations
        self._of_generations = Tokens(
            before.prompt + sum(one.prompt_tokens for one in found), before.new + sum(len(one.ids) for one in found)
        )
        return [_writable(one.text) for one in found]

    def _of_mode(self, mode: ImageMode | None) -> Answers:
        """The engine for questions whose images are made square that way; a server does it in its own way."""
        if mode not in self._engines:
            engine: Any = self._engines[None]
            self._engines[mode] = engine.with_vision(image_mode=mode) if hasattr(engine, "with_vision") else engine
        return self._engines[mode]


def _writable(text: str) -> str:
    """The text without halves of surrogate pairs, which a server may send and no file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
