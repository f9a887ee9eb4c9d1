"""Detokenization: byte tokens as SentencePiece decodes them, and incremental decoding of a growing token list.

Incremental decoding decodes a few tokens at a time and gives the same text as decoding the whole list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

_PARTIAL_CHARACTER = "\N{REPLACEMENT CHARACTER}"
_MAX_CHARACTER_BYTES = 4
_BYTE_TOKENS = {f"<0x{byte:02X}>": byte for byte in range(256)}

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Detokenizer:
    """Ids to text for one tokenizer.

    decode: ids to text, without special tokens.
    closes: whether text that ends with this token (and not in a replacement character) is final. Tokens that `decode`
            skips are not, because a run of byte tokens may continue after them.
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

    In a run of byte tokens (`<0xE2>`) that is not valid UTF-8, valid characters are kept and every other byte becomes a
    replacement character, as in SentencePiece; the `tokenizers` library replaces every byte of such a run.
    """
    backend = tokenizer.backend_tokenizer
    # Decoders without byte fallback treat such tokens as text.
    joins_bytes = backend.decoder is not None and backend.decoder.decode(["<0x61>"]) == "a"
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    skipped = special if skip_special_tokens else frozenset()

    def decode(ids: Sequence[int]) -> str:
        if joins_bytes:
            tokens = [backend.id_to_token(id_) for id_ in ids if id_ not in skipped]
            split = list(_split_runs([token for token in tokens if token is not None]))
            if "" in split:
                return str(backend.decoder.decode(split))
        # Clean-up would remove spaces before punctuation that the model generated.
        text = tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        return str(text)

    return decode


def _split_runs(tokens: Sequence[str]) -> Iterator[str]:
    """Yield the tokens, with "" around each byte outside a character, at which the decoder ends a run."""
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
    """Yield start, end and validity of each UTF-8 character, or of each byte that starts none."""
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
    """Incrementally decoded text: `settled` is final, `unsettled` may change with the next token.

    `settled + unsettled` is always the text of all tokens so far. Only the tokens from the last settled one on are
    decoded again; that one is included because decoders treat the first token of a text differently (LLaMA's drops
    its leading space).
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
        if self.detokenizer.closes(token) and not text.endswith(_PARTIAL_CHARACTER):
            self.settled += self.unsettled
            self.unsettled = ""
            self._window = [token]
            self._known = self.detokenizer.decode(self._window)
