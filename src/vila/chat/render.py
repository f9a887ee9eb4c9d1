"""One renderer: messages and a template become spans, for training, evaluation and serving alike."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from vila.chat.template import Span, Template
from vila.core.errors import DataError, TemplateError
from vila.core.types import Message, Sample, Text

_SYMBOLS = re.compile(r"(\{bos\}|\{eos\})")


def render(messages: Sequence[Message], template: Template, *, prompt: bool = False) -> list[Span]:
    """Write out a conversation.

    prompt: end where the assistant is to answer. A prompt may hold whatever the template can express: empty answers,
            and, where it marks each turn, turns in any order, also after an answer; where it marks the system text,
            that one anywhere too. A conversation to train on or to score alternates, and its answers are not empty.
    System messages at the beginning become one, a line each.
    Raises TemplateError with the index of the message as its field.
    """
    turns = _check_prompt(messages, template) if prompt else _check(messages, template)
    return [span for span in _spans(turns, template, prompt) if span.text or span.media]


def render_sample(sample: Sample, template: Template) -> list[list[Span]]:
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


def _check(messages: Sequence[Message], template: Template) -> Sequence[Message]:
    if not messages:
        raise TemplateError("the conversation is empty")
    if template.supervise == "all":
        return messages
    first = _leading_system(messages)
    for place, message in enumerate(messages[first:]):
        where = f"message {first + place + 1}"
        expected = ("user", "assistant")[place % 2]
        if message.role != expected:
            raise TemplateError(f"{where}: expected a turn of the {expected}, got {message.role!r}")
        if message.role == "assistant" and not message.text.strip():
            raise TemplateError(f"{where}: the assistant's answer is empty")
    if messages[-1].role != "assistant":
        raise TemplateError("the last message must be the assistant's")
    return messages


def _check_prompt(messages: Sequence[Message], template: Template) -> Sequence[Message]:
    if not messages:
        raise TemplateError("the conversation is empty")
    if template.supervise == "all":
        return messages
    first = _leading_system(messages)
    expected = "user"
    for place, message in enumerate(messages[first:], start=first):
        field = f"messages[{place}]"
        if message.role == "system":
            _check_system(message, place)
            if not template.marks_system:
                problem = f"template {template.name!r} cannot express a system message after other turns"
                raise TemplateError(problem, field=field, hint="put it at the beginning")
            continue
        if message.role != expected and not template.marks_turns:
            problem = f"a turn of the {message.role}, but template {template.name!r} needs turns that alternate"
            hint = "join it with the one before" if place > first else "begin with the user's turn"
            raise TemplateError(problem, field=field, expected=f"a turn of the {expected}", hint=hint)
        expected = "assistant" if message.role == "user" else "user"
    if expected == "user" and not template.marks_turns:
        problem = f"the last message must be the user's for template {template.name!r}"
        raise TemplateError(problem, field=f"messages[{len(messages) - 1}]")
    return messages


def _leading_system(messages: Sequence[Message]) -> int:
    """The number of system messages at the beginning. Raises TemplateError for media in one."""
    count = next((place for place, message in enumerate(messages) if message.role != "system"), len(messages))
    for place in range(count):
        _check_system(messages[place], place)
    return count


def _check_system(message: Message, place: int) -> None:
    if any(not isinstance(part, Text) for part in message.parts):
        problem = f"message {place + 1}: a system message holds text only"
        raise TemplateError(problem, field=f"messages[{place}]", hint="put the image into the user's turn")


def _spans(messages: Sequence[Message], template: Template, prompt: bool) -> Iterator[Span]:
    yield from _fixed(template.document_before)
    if template.supervise == "all":
        for message in messages:
            yield from _said(message, template, train=True)
        if not prompt:
            yield from _fixed(template.document_after, train=True)
        return
    system = template.system
    if first := _leading_system(messages):
        # Clients write several instructions one after the other; a template has one place for them.
        system, messages = "\n".join(message.text for message in messages[:first]), messages[first:]
    if not template.system_in_user:
        yield from _system(system, template)
    for place, message in enumerate(messages):
        if message.role == "system":
            yield from _fixed(template.system_before)
            yield from _said(message, template, train=False)
            yield from _fixed(template.system_after)
            continue
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


def _system(text: str | None, template: Template) -> Iterator[Span]:
    if text is None:
        return
    yield from _fixed(template.system_before)
    # The default system text is ours; one that the caller brought is content like any other.
    yield Span(text, "template" if text == template.system else "content")
    yield from _fixed(template.system_after)


def _fixed(text: str, train: bool = False) -> Iterator[Span]:
    for piece in _SYMBOLS.split(text):
        yield Span(piece, "special" if _SYMBOLS.fullmatch(piece) else "template", train)


def _said(message: Message, template: Template, *, train: bool) -> Iterator[Span]:
    for part in message.parts:
        if not isinstance(part, Text):
            yield from _fixed(template.media_before)
            yield Span("", "media", media=part)
            yield from _fixed(template.media_after)
        elif message.role == "assistant" or template.user_text or template.supervise == "all":
            yield Span(part.text, "content", train)
