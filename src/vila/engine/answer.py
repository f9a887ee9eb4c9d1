"""One growing answer: its tokens, the text that is certain, and what ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vila.engine.request import FinishReason, Generation

_HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclass
class Answer:
    """Tokens are taken one by one until a stop token or a stop string ends the answer.

    decode:     ids to text, special tokens left out.
    stop_ids:   tokens that end the answer and are not part of it.
    stop_texts: strings that end it wherever they appear, also across token borders.
    """

    decode: Callable[[Sequence[int]], str]
    stop_ids: frozenset[int]
    stop_texts: tuple[str, ...]
    ids: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    _cut: int | None = None

    def take(self, token: int) -> bool:
        """Add a token; False when the answer has ended."""
        if token in self.stop_ids:
            self.finish = "stop"
        else:
            self.ids.append(token)
            self._look_for_stops()
        return self.finish is None

    def _look_for_stops(self) -> None:
        if self.stop_texts:
            text = self.decode(self.ids)
            places = [place for stop in self.stop_texts if (place := text.find(stop)) >= 0]
            if places:
                self._cut, self.finish = min(places), "stop"

    @property
    def text(self) -> str:
        """The whole text so far, an ending stop string left out."""
        return self.decode(self.ids)[: self._cut]

    @property
    def certain_text(self) -> str:
        """The text that no later token can change: without half a character or what may begin a stop string."""
        text = self.text
        if self.finish is not None:
            return text
        text = text.rstrip(_HALF_CHARACTER)
        held = max((_overlap(text, stop) for stop in self.stop_texts), default=0)
        return text[: len(text) - held]

    def generation(self, prompt_tokens: int) -> Generation:
        """The finished answer; one that nothing ended was cut at its greatest length."""
        return Generation(self.text.strip(), tuple(self.ids), self.finish or "length", prompt_tokens)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
