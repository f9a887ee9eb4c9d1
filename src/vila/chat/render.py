"""One renderer: messages and a template become segments, for training, evaluation and serving alike."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from vila.chat.template import Segment, Template
from vila.core.errors import TemplateError
from vila.core.types import Message, Text

_SYMBOLS = re.compile(r"(\{bos\}|\{eos\})")


def render(messages: Sequence[Message], template: Template, *, prompt: bool = False) -> list[Segment]:
    """Write out a conversation.

    prompt: end where the assistant is to answer (the last message is then the user's).
    Raises TemplateError when roles do not alternate, an answer is empty, or the last turn is on the wrong side.
    """
    turns = _check(messages, template, prompt)
    return [segment for segment in _segments(turns, template, prompt) if segment.text or segment.media]


def _check(messages: Sequence[Message], template: Template, prompt: bool) -> Sequence[Message]:
    if not messages:
        raise TemplateError("the conversation is empty")
    if template.supervise == "all":
        return messages
    body = messages[1:] if messages[0].role == "system" else messages
    for place, message in enumerate(body):
        expected = ("user", "assistant")[place % 2]
        if message.role != expected:
            raise TemplateError(f"message {place + 1}: expected a turn of the {expected}, got {message.role!r}")
        if message.role == "assistant" and not message.text.strip():
            raise TemplateError(f"message {place + 1}: the assistant's answer is empty")
    if not body or prompt != (body[-1].role == "user"):
        wanted = "the user's" if prompt else "the assistant's"
        raise TemplateError(f"the last message must be {wanted}")
    return messages


def _segments(messages: Sequence[Message], template: Template, prompt: bool) -> Iterator[Segment]:
    every = template.supervise == "all"
    system = template.system
    if messages[0].role == "system" and not every:
        system, messages = messages[0].text, messages[1:]
    if system is not None and not every:
        yield from _fixed(template.system_before)
        # The default system text is ours; one that the caller brought is content like any other.
        yield Segment(system, "template" if system == template.system else "content")
        yield from _fixed(template.system_after)
    first = True
    for message in messages:
        if every:
            yield from _said(message, train=True)
        elif message.role == "user":
            before = template.first_user_before if first else None
            yield from _fixed(template.user_before if before is None else before)
            yield from _said(message, train=False, text=template.user_text)
            yield from _fixed(template.user_after)
            first = False
        else:
            yield from _fixed(template.assistant_before)
            yield from _fixed(template.answer_lead, train=True)
            yield from _said(message, train=True)
            yield from _fixed(template.answer_after, train=True)
            yield from _fixed(template.answer_tail)
    if prompt and not every:
        yield from _fixed(template.assistant_before)
    if not prompt:
        yield from _fixed(template.document_after, train=every)


def _fixed(text: str, train: bool = False) -> Iterator[Segment]:
    for piece in _SYMBOLS.split(text):
        yield Segment(piece, "special" if _SYMBOLS.fullmatch(piece) else "template", train)


def _said(message: Message, train: bool, text: bool = True) -> Iterator[Segment]:
    for part in message.parts:
        if isinstance(part, Text):
            if text:
                yield Segment(part.text, "content", train)
        else:
            yield Segment("", "media", media=part)
