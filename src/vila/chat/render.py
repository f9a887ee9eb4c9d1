"""Render messages with a conversation template as spans; the one renderer of training, evaluation and serving."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vila.chat.template import Span, Template, split_symbols
from vila.core.errors import DataError, TemplateError
from vila.core.types import Message, Sample, Text


def render(messages: Sequence[Message], template: Template, *, prompt: bool = False) -> list[Span]:
    """Render a conversation.

    prompt: render a prompt, which ends where the assistant's answer begins. A prompt may hold everything that the
            template can express: empty answers; turns in any order if the template marks every turn; system messages
            anywhere if it marks them. Without `prompt`, user and assistant alternate and answers are not empty.
    Leading system messages are joined by line breaks.
    Raises TemplateError with `field` "messages[INDEX]".
    """
    _check(messages, template, prompt)
    return [span for span in _spans(messages, template, prompt) if span.text or span.media]


def render_sample(sample: Sample, template: Template) -> list[list[Span]]:
    """Render every conversation of a training sample. Raises DataError with the sample and the field."""
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
    """Reject samples whose questions a caption template would drop. Upstream asserts two turns and an image."""
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


def _check(messages: Sequence[Message], template: Template, prompt: bool) -> None:
    if not messages:
        raise TemplateError("the conversation is empty", field="messages")
    if template.supervise == "all":
        return
    first = _num_leading_system(messages)
    for index, message in enumerate(messages):
        if message.role == "system":
            _check_system(message, index)
    if prompt:
        _check_prompt_roles(messages, first, template)
        return
    for index, message in enumerate(messages[first:], start=first):
        expected = ("user", "assistant")[(index - first) % 2]
        if message.role != expected:
            raise TemplateError("unexpected role", field=f"messages[{index}]", value=message.role, expected=expected)
        if message.role == "assistant" and not message.text.strip():
            raise TemplateError("the answer is empty", field=f"messages[{index}]")
    if messages[-1].role != "assistant":
        field = f"messages[{len(messages) - 1}]"
        raise TemplateError("unexpected role of the last message", field=field, value="user", expected="assistant")


def _check_prompt_roles(messages: Sequence[Message], first: int, template: Template) -> None:
    expected = "user"
    for index, message in enumerate(messages[first:], start=first):
        field = f"messages[{index}]"
        if message.role == "system":
            if not template.marks_system:
                problem = f"template {template.name!r} cannot express a system message after other turns"
                raise TemplateError(problem, field=field, hint="put it at the beginning")
            continue
        if message.role != expected and not template.marks_turns:
            problem = f"a turn of the {message.role}, but template {template.name!r} needs turns that alternate"
            hint = "join it with the one before" if index > first else "begin with the user's turn"
            raise TemplateError(problem, field=field, expected=f"a turn of the {expected}", hint=hint)
        expected = "assistant" if message.role == "user" else "user"
    if expected == "user" and not template.marks_turns:
        problem = f"the last message must be the user's for template {template.name!r}"
        raise TemplateError(problem, field=f"messages[{len(messages) - 1}]")


def _num_leading_system(messages: Sequence[Message]) -> int:
    return next((index for index, message in enumerate(messages) if message.role != "system"), len(messages))


def _check_system(message: Message, index: int) -> None:
    if any(not isinstance(part, Text) for part in message.parts):
        hint = "put the image into the user's turn"
        raise TemplateError("a system message must contain text only", field=f"messages[{index}]", hint=hint)


def _spans(messages: Sequence[Message], template: Template, prompt: bool) -> Iterator[Span]:
    yield from _template_text(template.document_before)
    if template.supervise == "all":
        for message in messages:
            yield from _content(message, template, train=True)
        if not prompt:
            yield from _template_text(template.document_after, train=True)
        return
    system = template.system
    if first := _num_leading_system(messages):
        system, messages = "\n".join(message.text for message in messages[:first]), messages[first:]
    if not template.system_in_user:
        yield from _system(system, template)
    for index, message in enumerate(messages):
        if message.role == "system":
            yield from _template_text(template.system_before)
            yield from _content(message, template, train=False)
            yield from _template_text(template.system_after)
            continue
        if message.role == "assistant":
            yield from _template_text(template.assistant_before)
            yield from _template_text(template.answer_lead, train=True)
            yield from _content(message, template, train=True)
            yield from _template_text(template.answer_after, train=True)
            yield from _template_text(template.answer_tail)
            continue
        before = None if index else template.first_user_before
        yield from _template_text(template.user_before if before is None else before)
        if template.system_in_user and not index and system:
            yield from _system(system, template)
        yield from _content(message, template, train=False)
        yield from _template_text(template.user_after)
    yield from _template_text(template.assistant_before if prompt else template.document_after)


def _system(text: str | None, template: Template) -> Iterator[Span]:
    if text is None:
        return
    yield from _template_text(template.system_before)
    # The default system text may hold special tokens; a caller's text is content like any other.
    yield Span(text, "template" if text == template.system else "content")
    yield from _template_text(template.system_after)


def _template_text(text: str, train: bool = False) -> Iterator[Span]:
    for piece, is_symbol in split_symbols(text):
        yield Span(piece, "special" if is_symbol else "template", train)


def _content(message: Message, template: Template, *, train: bool) -> Iterator[Span]:
    for part in message.parts:
        if not isinstance(part, Text):
            yield from _template_text(template.media_before)
            yield Span("", "media", media=part)
            yield from _template_text(template.media_after)
        elif message.role == "assistant" or template.user_text or template.supervise == "all":
            yield Span(part.text, "content", train)
