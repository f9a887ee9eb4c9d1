"""Token ids to text: byte tokens as SentencePiece decodes them, and text that grows token by token.

The text of a growing list of tokens is decoded a few tokens at a time, and is still that of the whole list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

_HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"
_MAX_CHARACTER_BYTES = 4
_BYTE_TOKENS = {f"<0x{byte:02X}>": byte for byte in range(256)}

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Detokenizer:
    """Ids to text for one tokenizer.

    decode: ids to text, special tokens left out.
    closes: whether text that ends with this token, and in no replacement character, is final. Tokens that `decode`
            leaves out are not, because a run of byte tokens goes on behind them.
    """

    decode: Decode
    closes: Callable[[int], bool]


def detokenizer_of(tokenizer: Any) -> Detokenizer:
    """Return the detokenizer of a transformers tokenizer backed by the `tokenizers` library."""
    size = len(tokenizer)
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    return Detokenizer(decoder_of(tokenizer), lambda token: token < size and token not in special)


def decoder_of(tokenizer: Any, *, skip_special_tokens: bool = True) -> Decode:
    """Return the function from ids to text of a transformers tokenizer; ids past the vocabulary are left out.

    A run of byte tokens (`<0xE2>`) that is not valid UTF-8 keeps its valid characters and has one replacement character
    for each other byte, as SentencePiece decodes it; the `tokenizers` library replaces every byte of such a run.
    """
    backend = tokenizer.backend_tokenizer
    # A decoder without byte fallback takes such tokens for text.
    joins_bytes = backend.decoder is not None and backend.decoder.decode(["<0x61>"]) == "a"
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    skipped = special if skip_special_tokens else frozenset()

    def decode(ids: Sequence[int]) -> str:
        if joins_bytes:
            tokens = [backend.id_to_token(id_) for id_ in ids if id_ not in skipped]
            split = list(_split_runs([token for token in tokens if token is not None]))
            if "" in split:
                return str(backend.decoder.decode(split))
        # Cleaning up would take away spaces before punctuation that the model wrote.
        text = tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        return str(text)

    return decode


def _split_runs(tokens: Sequence[str]) -> Iterator[str]:
    """Yield the tokens, with "" around each byte that is part of no character: the decoder ends a run there."""
    start = 0
    while start < len(tokens):
        end = start
        while end < len(tokens) and tokens[end] in _BYTE_TOKENS:
            end += 1
        if end == start:
            yield tokens[start]
            start += 1
            continue
        run = bytes(_BYTE_TOKENS[token] for token in tokens[start:end])
        for first, last, is_character in _characters(run):
            yield from tokens[start + first : start + last] if is_character else ("", tokens[start + first], "")
        start = end


def _characters(run: bytes) -> Iterator[tuple[int, int, bool]]:
    """Yield start, end and validity of each UTF-8 character, or of each single byte that begins none."""
    start = 0
    while start < len(run):
        size = next((n for n in range(1, _MAX_CHARACTER_BYTES + 1) if _is_utf8(run[start : start + n])), 0)
        yield start, start + (size or 1), bool(size)
        start += size or 1


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


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
