"""An answer in progress: its tokens, its final text and its stop conditions."""

from __future__ import annotations

from dataclasses import dataclass, field

from vila.engine.detokenize import Detokenizer, TextStream
from vila.engine.request import FinishReason, Generation, TokenLogprob


@dataclass
class Answer:
    """Collects tokens until a stop token or a stop string ends the answer.

    stop_ids:   tokens that end the answer and are not part of it.
    stop_texts: strings that end it, also across token boundaries.
    draft_tokens, accepted_tokens: statistics of prompt lookup.
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
    _num_detokenized: int = 0

    def __post_init__(self) -> None:
        self._stream = TextStream(self.detokenizer)
        self._longest_stop = max(map(len, self.stop_texts), default=0)

    def take(self, token: int, logprob: TokenLogprob | None = None) -> bool:
        """Add a token; return False if the answer has ended."""
        if token in self.stop_ids:
            self.finish = "stop"
            return False
        self.ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if self.stop_texts:
            self._find_stop_strings()
        return self.finish is None

    def _find_stop_strings(self) -> None:
        # Settled text was searched before, but a stop string may begin near its end.
        start = max(0, len(self._stream.settled) - self._longest_stop + 1)
        self._detokenize()
        text = self._stream.settled[start:] + self._stream.unsettled
        places = [place for stop in self.stop_texts if (place := text.find(stop)) >= 0]
        if places:
            self._cut, self.finish = start + min(places), "stop"

    def _detokenize(self) -> None:
        for token in self.ids[self._num_detokenized :]:
            self._stream.take(token)
        self._num_detokenized = len(self.ids)

    @property
    def text(self) -> str:
        """The whole text so far, without a final stop string."""
        return self.detokenizer.decode(self.ids)[: self._cut]

    @property
    def final_text(self) -> str:
        """Text that later tokens cannot change: without partial characters and possible beginnings of stop strings."""
        if self.finish is not None:
            return self.text
        self._detokenize()
        text = self._stream.settled
        held = max((_overlap(text, stop) for stop in self.stop_texts), default=0)
        return text[: len(text) - held]

    def generation(self, prompt_tokens: int, dropped_messages: int = 0) -> Generation:
        """Return the finished answer; without a stop condition its finish reason is `length`."""
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
    """Return the length of the longest suffix of `text` that is a prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
