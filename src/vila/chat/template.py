"""The shape of a conversation template, and what a rendered conversation is made of."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Literal

from vila.core.types import Image, Video

_SPECIAL = re.compile(r"<\|[^<>|]+\|>|</?s>|\{bos\}|\{eos\}")

Kind = Literal["template", "content", "special", "media"]


@dataclass(frozen=True, slots=True)
class Span:
    """A rendered piece of a conversation.

    kind:  `template` and `special` may hold special tokens; `content` is what somebody wrote and never does;
           `media` stands for the picture or clip in `media`, its text is empty.
    train: whether the tokens of this piece are supervised.
    """

    text: str
    kind: Kind
    train: bool = False
    media: Image | Video | None = None


@dataclass(frozen=True, slots=True)
class Template:
    """How a conversation is written out. `{bos}` and `{eos}` in any string stand for the tokenizer's own tokens.

    Every string is template text; what the speakers say is inserted between `before` and `after`.
    """

    name: str
    document_before: str = ""
    """Opens the whole text, before the system block."""
    system: str | None = None
    """Default system text; None leaves the whole system block out unless the conversation brings one."""
    system_before: str = ""
    system_after: str = ""
    system_in_user: bool = False
    """The system block stands inside the first user turn, after what opens that; an empty system text leaves it out."""
    user_before: str = ""
    first_user_before: str | None = None
    """What stands before the first user turn where it differs from `user_before`."""
    user_after: str = ""
    assistant_before: str = ""
    """Ends the prompt at inference; never supervised."""
    answer_lead: str = ""
    """White space that opens the answer and is supervised with it."""
    answer_after: str = ""
    """Ends the answer; supervised."""
    answer_tail: str = ""
    """Follows the end of the answer; not supervised."""
    document_after: str = ""
    """Ends the whole text; supervised when `supervise` is `all`."""
    media_before: str = ""
    """Stands before every medium; never supervised."""
    media_after: str = ""
    """Stands after every medium; never supervised."""
    media_gap: str = "\n"
    """What a front end writes after each picture that it puts before a question, and after each frame of a clip.

    The renderer writes messages part after part and never adds it.
    """
    supervise: Literal["answers", "all"] = "answers"
    user_text: bool = True
    """False drops what the user writes and keeps only the media (captions)."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer at inference, besides the tokenizer's end of sequence."""

    @property
    def special_tokens(self) -> frozenset[str]:
        """Special tokens that the template writes, such as `</s>`; `{bos}` and `{eos}` are the tokenizer's own."""
        texts = [getattr(self, field.name) for field in fields(self)]
        # Stop strings, which are a tuple, may be plain text.
        return frozenset(token for text in texts if isinstance(text, str) for token in _SPECIAL.findall(text))

    @property
    def marks_turns(self) -> bool:
        """Whether every turn opens with its speaker's mark, so that turns can follow each other in any order."""
        marks = (self.user_before, self.assistant_before)
        return all(marks) and marks[0] != marks[1] and self.first_user_before is None and self.user_text

    @property
    def marks_system(self) -> bool:
        """Whether a system text has a mark that no other turn has, so that it can stand anywhere."""
        others = ("", self.user_before, self.assistant_before)
        return self.marks_turns and not self.system_in_user and self.system_before not in others
