"""`Template`: how a conversation is written as text; `Span`: a piece of a rendered conversation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from vila.core.types import Image, Video

_SPECIAL = re.compile(r"<\|[^<>|]+\|>|</?s>|\{bos\}|\{eos\}")
_SYMBOLS = re.compile(r"(\{bos\}|\{eos\})")

Kind = Literal["template", "content", "special", "media"]


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a rendered conversation.

    kind:  `template`: text of the template, may hold special tokens; `special`: `{bos}` or `{eos}`; `content`: text of
           a message, never parsed for special tokens; `media`: the image or video `media`, with empty text.
    train: whether its tokens are supervised.
    """

    text: str
    kind: Kind
    train: bool = False
    media: Image | Video | None = None


@dataclass(frozen=True, slots=True)
class Template:
    """Conversation template. `{bos}` and `{eos}` in any string are the tokenizer's own BOS and EOS tokens."""

    name: str
    document_before: str = ""
    """Start of the text, before the system block."""
    system: str | None = None
    """Default system text; None: no system block unless the conversation has a system message."""
    system_before: str = ""
    """Start of the system block."""
    system_after: str = ""
    """End of the system block."""
    system_in_user: bool = False
    """Put the system block into the first user turn, after `user_before`; an empty system text then has no block."""
    user_before: str = ""
    """Start of a user turn."""
    first_user_before: str | None = None
    """Start of the first user turn; None: `user_before`."""
    user_after: str = ""
    """End of a user turn."""
    assistant_before: str = ""
    """Start of an assistant turn and end of a prompt; not supervised."""
    answer_lead: str = ""
    """White space before the answer; supervised."""
    answer_after: str = ""
    """End of the answer; supervised."""
    answer_tail: str = ""
    """Text after the end of the answer; not supervised."""
    document_after: str = ""
    """End of the text; supervised if `supervise` is `all`."""
    media_before: str = ""
    """Text before every image or video; not supervised."""
    media_after: str = ""
    """Text after every image or video; not supervised."""
    media_gap: str = "\n"
    """Text that front ends put after each image before the question, and after each frame of a video. Not written by
    the renderer."""
    supervise: Literal["answers", "all"] = "answers"
    """`answers`: only the assistant's text is supervised; `all`: all text (interleaved pages)."""
    user_text: bool = True
    """False: omit the user's text and keep its media (image captions)."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer, in addition to EOS."""

    @property
    def special_tokens(self) -> frozenset[str]:
        """Special tokens in the template text, such as `</s>`, `{bos}` and `{eos}`. Stop strings are not searched."""
        texts = [getattr(self, field.name) for field in fields(self)]
        return frozenset(token for text in texts if isinstance(text, str) for token in _SPECIAL.findall(text))

    @property
    def marks_turns(self) -> bool:
        """Whether every turn starts with a mark of its role, so that turns may come in any order."""
        marks = (self.user_before, self.assistant_before)
        return all(marks) and marks[0] != marks[1] and self.first_user_before is None and self.user_text

    @property
    def marks_system(self) -> bool:
        """Whether a system text starts with a mark that no other turn has, so that it may come anywhere."""
        others = ("", self.user_before, self.assistant_before)
        return self.marks_turns and not self.system_in_user and self.system_before not in others


def split_symbols(text: str) -> Iterator[tuple[str, bool]]:
    """Split template text into (piece, whether it is `{bos}` or `{eos}`); empty pieces are omitted."""
    for index, piece in enumerate(_SYMBOLS.split(text)):
        if piece:
            yield piece, index % 2 == 1
