"""One renderer: messages and a template become segments, for training, evaluation and serving alike."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from vila.chat.template import Segment, Template
from vila.core.errors import DataError, TemplateError
from vila.core.types import Message, Sample, Text

_SYMBOLS = re.compile(r"(\{bos\}|\{eos\})")


def render(messages: Sequence[Message], template: Template, *, prompt: bool = False) -> list[Segment]:
    """Write out a conversation.

    prompt: end where the assistant is to answer (the last message is then the user's).
    Raises TemplateError when roles do not alternate, an answer is empty, or the last turn is on the wrong side.
    """
    turns = _check(messages, template, prompt)
    return [segment for segment in _segments(turns, template, prompt) if segment.text or segment.media]


def render_sample(sample: Sample, template: Template) -> list[list[Segment]]:
    """Write out the conversations of a training sample. Raises DataError with the sample, the field and the reason."""
    try:
        if not template.user_text:
            _check_caption(sample)
        return [render(messages, template) for messages in sample.conversations()]
    except TemplateError as error:
        raise DataError(
            f"{error.problem} (template {template.name!r})",
            record=f"sample {sample.id!r}",
            field=error.field,
            value=error.value,
            expected=error.expected,
            hint=error.hint,
        ) from error


def _check_caption(sample: Sample) -> None:
    """Refuse a sample whose questions a caption template would drop. The original asserts two turns and an image."""
    hint = "give its data set another template, such as the model's own"
    if len(sample.branches) > 1:
        raise TemplateError(f"{len(sample.branches)} branches", field="branches", expected="one caption", hint=hint)
    (messages,) = sample.conversations()
    if len(messages) != 2:
        raise TemplateError(
            f"{len(messages)} turns", field="messages", expected="an image and its caption, two turns", hint=hint
        )
    if all(isinstance(part, Text) for part in messages[0].parts):
        raise TemplateError("no image, and the question is not trained on", field="messages[0]", hint=hint)


def _check(messages: Sequence[Message], template: Template, prompt: bool) -> Sequence[Message]:
    if not messages:
        raise TemplateError("the conversation is empty")
    if template.supervise == "all":
        return messages
    first = int(messages[0].role == "system")
    if first and any(not isinstance(part, Text) for part in messages[0].parts):
        raise TemplateError("message 1: a system message holds text only; put the picture into the user's turn")
    body = messages[first:]
    for place, message in enumerate(body):
        where = f"message {first + place + 1}"
        expected = ("user", "assistant")[place % 2]
        if message.role != expected:
            raise TemplateError(f"{where}: expected a turn of the {expected}, got {message.role!r}")
        if message.role == "assistant" and not message.text.strip():
            raise TemplateError(f"{where}: the assistant's answer is empty")
    if not body or prompt != (body[-1].role == "user"):
        wanted = "the user's" if prompt else "the assistant's"
        raise TemplateError(f"the last message must be {wanted}")
    return messages


def _segments(messages: Sequence[Message], template: Template, prompt: bool) -> Iterator[Segment]:
    yield from _fixed(template.document_before)
    if template.supervise == "all":
        for message in messages:
            yield from _said(message, template, train=True)
        if not prompt:
            yield from _fixed(template.document_after, train=True)
        return
    system = template.system
    if messages[0].role == "system":
        system, messages = messages[0].text, messages[1:]
    if not template.system_in_user:
        yield from _system(system, template)
    for place, message in enumerate(messages):
        if message.role == "assistant":
            yield from _fixed(template.assistant_before)
            yield from _fixed(template.answer_lead, train=True)
            yield from _said(message, template, train=True)
            yield from _fixed(template.answer_after, train=True)
            yield from _fixed(template.answer_tail)
            continue
        before = None if place else template.first_user_before
        yield from _fixed(template.user_before if before is None else before)
        if template.system_in_user and not place and system:
            yield from _system(system, template)
        yield from _said(message, template, train=False)
        yield from _fixed(template.user_after)
    yield from _fixed(template.assistant_before if prompt else template.document_after)


def _system(text: str | None, template: Template) -> Iterator[Segment]:
    if text is None:
        return
    yield from _fixed(template.system_before)
    # The default system text is ours; one that the caller brought is content like any other.
    yield Segment(text, "template" if text == template.system else "content")
    yield from _fixed(template.system_after)


def _fixed(text: str, train: bool = False) -> Iterator[Segment]:
    for piece in _SYMBOLS.split(text):
        yield Segment(piece, "special" if _SYMBOLS.fullmatch(piece) else "template", train)


def _said(message: Message, template: Template, *, train: bool) -> Iterator[Segment]:
    for part in message.parts:
        if not isinstance(part, Text):
            yield from _fixed(template.media_before)
            yield Segment("", "media", media=part)
            yield from _fixed(template.media_after)
        elif message.role == "assistant" or template.user_text or template.supervise == "all":
            yield Segment(part.text, "content", train)
