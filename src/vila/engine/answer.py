"""One growing answer: its tokens, the text that is certain, and what ends it."""

from __future__ import annotations

from dataclasses import dataclass, field

from vila.engine.detokenize import Detokenizer, TextStream
from vila.engine.request import FinishReason, Generation, TokenLogprob


@dataclass
class Answer:
    """Tokens are taken one by one until a stop token or a stop string ends the answer.

    stop_ids:   tokens that end the answer and are not part of it.
    stop_texts: strings that end it wherever they appear, also across token borders.
    tried, accepted: tokens that were tried ahead, and how many of them it took.
    """

    detokenizer: Detokenizer
    stop_ids: frozenset[int]
    stop_texts: tuple[str, ...]
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    draft_tokens: int = 0
    accepted_tokens: int = 0
    _cut: int | None = None
    _read: int = 0

    def __post_init__(self) -> None:
        self._stream = TextStream(self.detokenizer)
        self._longest_stop = max(map(len, self.stop_texts), default=0)

    def take(self, token: int, logprob: TokenLogprob | None = None) -> bool:
        """Add a token; False when the answer has ended."""
        if token in self.stop_ids:
            self.finish = "stop"
            return False
        self.ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if self.stop_texts:
            self._look_for_stops()
        return self.finish is None

    def _look_for_stops(self) -> None:
        # What was settled before has been searched; a stop string may still have begun there.
        start = max(0, len(self._stream.settled) - self._longest_stop + 1)
        self._read_on()
        text = self._stream.settled[start:] + self._stream.unsettled
        places = [place for stop in self.stop_texts if (place := text.find(stop)) >= 0]
        if places:
            self._cut, self.finish = start + min(places), "stop"

    def _read_on(self) -> None:
        for token in self.ids[self._read :]:
            self._stream.take(token)
        self._read = len(self.ids)

    @property
    def text(self) -> str:
        """The whole text so far, an ending stop string left out."""
        return self.detokenizer.decode(self.ids)[: self._cut]

    @property
    def certain_text(self) -> str:
        """The text that no later token can change: without half a character or what may begin a stop string."""
        if self.finish is not None:
            return self.text
        self._read_on()
        text = self._stream.settled
        held = max((_overlap(text, stop) for stop in self.stop_texts), default=0)
        return text[: len(text) - held]

    def generation(self, prompt_tokens: int, dropped_messages: int = 0) -> Generation:
        """The finished answer; one that nothing ended was cut at its greatest length."""
        return Generation(
            self.text.strip(),
            tuple(self.ids),
            self.finish or "length",
            prompt_tokens,
            tuple(self.logprobs),
            dropped_messages,
            self.draft_tokens,
            self.accepted_tokens,
        )


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
