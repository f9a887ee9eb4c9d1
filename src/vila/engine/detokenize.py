"""The text of a growing list of tokens, decoded a few tokens at a time and still that of the whole list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Detokenizer:
    """Ids to text for one tokenizer.

    decode:    ids to text, special tokens left out.
    closes:    whether a token's text is settled as soon as it stands there. Byte tokens (`<0x0A>`) do not: a decoder
               joins a run of them and turns all of it into replacement characters where it is not UTF-8. Neither do
               tokens that decoding leaves out, because the run goes on behind them.
    """

    decode: Callable[[Sequence[int]], str]
    closes: Callable[[int], bool]


def detokenizer_of(tokenizer: Any) -> Detokenizer:
    """The detokenizer of a transformers tokenizer backed by the `tokenizers` library."""
    backend = tokenizer.backend_tokenizer
    size = len(tokenizer)
    open_ids = {backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    open_ids |= {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}

    def decode(ids: Sequence[int]) -> str:
        # Cleaning up would take away spaces before punctuation that the model wrote.
        return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return Detokenizer(decode, lambda token: token < size and token not in open_ids)


@dataclass
class TextStream:
    """Text that grows token by token: `settled` is final, `unsettled` may still change with the next token.

    `settled + unsettled` is at every moment the text of all tokens so far. Only the tokens since the last settled one
    are decoded again, together with that one: a decoder treats the first token of a text apart (LLaMA's loses its
    space), and so the settled one takes that place.
    """

    detokenizer: Detokenizer
    settled: str = ""
    unsettled: str = ""
    _window: list[int] = field(default_factory=list)
    _known: str = ""

    def take(self, token: int) -> None:
        """Add a token."""
        self._window.append(token)
        text = self.detokenizer.decode(self._window)
        self.unsettled = text[len(self._known) :]
        if self.detokenizer.closes(token) and not text.endswith(_HALF_CHARACTER):
            self.settled += self.unsettled
            self.unsettled = ""
            self._window = [token]
            self._known = self.detokenizer.decode(self._window)
