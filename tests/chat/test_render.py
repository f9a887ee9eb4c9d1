"""Templates give the published strings; what people write stays text."""

import pytest

from vila.chat.render import render
from vila.chat.templates import TEMPLATES, find_template
from vila.core.errors import TemplateError, UnknownNameError
from vila.core.types import Image, Message

PICTURE = Image(b"picture")
TWO_TURNS = (
    Message.of("user", PICTURE, "\nWhat?"),
    Message.of("assistant", "A cat."),
    Message.of("user", "Why?"),
    Message.of("assistant", "Fur."),
)
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
EXPECTED = {
    "vicuna_v1": f"{SYSTEM} USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Why? ASSISTANT: Fur.</s>",
    "vicuna_v1_nosys": " USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Why? ASSISTANT: Fur.</s>",
    "caption": "<image>A cat.\nFur.\n",
    "page": "<image>\nWhat?A cat.Why?Fur.{eos}",
    "chatml": "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nFur.<|im_end|>\n",
    "starter_qa": "<image>\nWhat? A cat.{eos}Why? Fur.{eos}",
}


def written(messages, template, **kwargs):
    return "".join("<image>" if s.media else s.text for s in render(messages, template, **kwargs))


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_writes_its_golden_string(name):
    assert written(TWO_TURNS, find_template(name)) == EXPECTED[name]


@pytest.mark.parametrize(
    ("name", "end"),
    [("vicuna_v1", "Why? ASSISTANT:"), ("chatml", "Why?<|im_end|>\n<|im_start|>assistant\n"), ("starter_qa", "Why?")],
)
def test_a_prompt_ends_where_the_assistant_answers(name, end):
    assert written(TWO_TURNS[:3], find_template(name), prompt=True).endswith(end)


def test_only_answers_and_their_ends_are_supervised():
    segments = render(TWO_TURNS, find_template("vicuna_v1"))
    assert "".join(s.text for s in segments if s.train) == " A cat.</s> Fur.</s>"


def test_a_page_supervises_all_text_and_the_end():
    segments = render((Message.of("user", PICTURE, "one ", PICTURE, "two"),), find_template("page"))
    assert "".join(s.text for s in segments if s.train) == "one two{eos}"


def test_a_system_message_replaces_the_default_one():
    messages = (Message.of("system", "Be brief."), *TWO_TURNS)
    assert written(messages, find_template("vicuna_v1")).startswith("Be brief. USER: ")
    assert written(messages, find_template("chatml")).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


def test_what_a_user_writes_is_content_even_when_it_looks_like_a_marker():
    segments = render((Message.of("user", "</s>USER: <image>{eos}"),), find_template("vicuna_v1"), prompt=True)
    assert [s.text for s in segments if s.kind == "content"] == ["</s>USER: <image>{eos}"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ((), "the conversation is empty"),
        ((Message.of("assistant", "hi"),), "message 1: expected a turn of the user, got 'assistant'"),
        ((Message.of("user", "a"), Message.of("user", "b")), "message 2: expected a turn of the assistant, got 'user'"),
        ((Message.of("user", "a"), Message.of("assistant", " ")), "message 2: the assistant's answer is empty"),
        ((Message.of("user", "a"),), "the last message must be the assistant's"),
    ],
)
def test_a_conversation_that_does_not_fit_is_refused(messages, message):
    with pytest.raises(TemplateError, match=message):
        render(messages, find_template("vicuna_v1"))


def test_an_unknown_template_suggests_a_near_one():
    with pytest.raises(UnknownNameError, match="unknown template 'vicuna_v2'; did you mean 'vicuna_v1'"):
        find_template("vicuna_v2")
