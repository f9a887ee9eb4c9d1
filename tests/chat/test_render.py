"""Templates render the published strings; content of messages is never parsed."""

import hashlib
from itertools import groupby

import pytest

from vila.chat import templates
from vila.chat.render import render
from vila.chat.templates import TEMPLATES, find_template
from vila.core.errors import MISSING, TemplateError, UnknownNameError
from vila.core.types import Image, Message

IMAGE = Image(b"image")
TWO_TURNS = (
    Message.of("user", IMAGE, "\nWhat?"),
    Message.of("assistant", "A cat."),
    Message.of("user", "Why?"),
    Message.of("assistant", "Fur."),
)
USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
TAGS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language.The "
    "visual content will be provided with the following format: <Image>visual content</Image>."
)
LLAVA = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
VICUNA = " USER: <image>\nWhat? ASSISTANT:~ A cat.</s>~USER: Why? ASSISTANT:~ Fur.</s>~"
VERSION_0 = "###Human: <image>\nWhat?###Assistant:~ A cat.###~Human: Why?###Assistant:~ Fur.###~"
LLAMA_2 = "\n<</SYS>>\n\n<image>\nWhat? [/INST]~ A cat. </s>~<s>[INST] Why? [/INST]~ Fur. </s>~"
MPT = (
    "<|im_end|><|im_start|>user\n<image>\nWhat?<|im_end|><|im_start|>assistant\n~A cat.<|im_end|>~"
    "<|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n~Fur.<|im_end|>~"
)
AS_SYSTEM, AS_USER = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("system", "user"))
# Text between two "~" is supervised.
EXPECTED = {
    "vicuna_v1": USER + VICUNA,
    "vicuna_v1_nosys": VICUNA,
    "llava_v1": HUMAN + VICUNA,
    "v1_mmtag": TAGS + VICUNA.replace("<image>", "<Image><image></Image>"),
    "llava_v0": HUMAN + VERSION_0,
    "v0_mmtag": TAGS + VERSION_0.replace("<image>", "<Image><image></Image>"),
    "v0": f"{HUMAN}###Human: {templates.V0_QUESTION}###Assistant: {templates.V0_ANSWER}{VERSION_0}",
    "llama_2": f"[INST] <<SYS>>\n{templates.LLAMA_2}{LLAMA_2}",
    "llava_llama_2": f"[INST] <<SYS>>\n{LLAVA}{LLAMA_2}",
    "mistral": "<s>[INST] <image>\nWhat? [/INST]~A cat.</s>~[INST] Why? [/INST]~Fur.</s>~",
    "mpt": "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    f"The assistant gives helpful and honest answers.{MPT}",
    "hermes-2": f"<|im_start|>system\nAnswer the questions.{MPT}",
    "llama_3": f"<|begin_of_text|>{AS_SYSTEM}{LLAVA}<|end_of_text|>"
    f"{AS_USER}<image>\nWhat?<|end_of_text|>{AS_SYSTEM}~A cat.<|end_of_text|>~"
    f"{AS_USER}Why?<|end_of_text|>{AS_SYSTEM}~Fur.<|end_of_text|>~",
    "chatml": "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n~A cat.<|im_end|>~\n"
    "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n~Fur.<|im_end|>~\n",
    "caption": "<image>~A cat.\nFur.\n~",
    "page": "<image>~\nWhat?A cat.Why?Fur.{eos}~",
    "starter_qa": "<image>\nWhat?~ A cat.{eos}~Why?~ Fur.{eos}~",
}


def as_text(messages, template, **kwargs):
    return "".join("<image>" if s.media else s.text for s in render(messages, template, **kwargs))


def with_supervision(messages, template):
    """The rendered text with a "~" wherever supervision starts or ends."""
    groups = groupby(render(messages, template), key=lambda span: span.train)
    texts = [(train, "".join("<image>" if s.media else s.text for s in group)) for train, group in groups]
    return "".join(f"~{text}~" if train else text for train, text in texts)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_renders_and_supervises_its_golden_string(name):
    assert with_supervision(TWO_TURNS, find_template(name)) == EXPECTED[name]


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (templates.LLAMA_2, "d52c188a3c969c4e"),
        (templates.V0_QUESTION + templates.V0_ANSWER, "ebcff27c10465f99"),
    ],
)
def test_the_long_published_texts_have_their_hashes(text, start):
    assert hashlib.sha256(text.encode()).hexdigest().startswith(start)


@pytest.mark.parametrize(
    ("alias", "name"),
    [("v1", "vicuna_v1"), ("default", "v0"), ("plain", "caption"), ("v0_plain", "caption"), ("hermes_2", "hermes-2")],
)
def test_aliases_find_the_same_template(alias, name):
    assert find_template(alias) is find_template(name)


def test_only_compact_templates_have_no_media_gap():
    assert [name for name, template in TEMPLATES.items() if not template.media_gap] == ["caption", "page", "starter_qa"]


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("vicuna_v1", "Why? ASSISTANT:"),
        ("v0", "Why?###Assistant:"),
        ("llama_2", "</s><s>[INST] Why? [/INST]"),
        ("mistral", "</s>[INST] Why? [/INST]"),
        ("hermes-2", "Why?<|im_end|><|im_start|>assistant\n"),
        ("llama_3", f"Why?<|end_of_text|>{AS_SYSTEM}"),
        ("chatml", "Why?<|im_end|>\n<|im_start|>assistant\n"),
        ("starter_qa", "Why?"),
    ],
)
def test_a_prompt_ends_before_the_answer(name, end):
    assert as_text(TWO_TURNS[:3], find_template(name), prompt=True).endswith(end)


def test_a_page_supervises_all_text_and_the_end():
    spans = render((Message.of("user", IMAGE, "one ", IMAGE, "two"),), find_template("page"))
    assert "".join(s.text for s in spans if s.train) == "one two{eos}"


def test_a_system_message_replaces_the_default_one():
    messages = (Message.of("system", "Be brief."), *TWO_TURNS)
    assert as_text(messages, find_template("vicuna_v1")).startswith("Be brief. USER: ")
    assert as_text(messages, find_template("chatml")).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("llama_2", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>"),
        ("mistral", "<s>[INST] Be brief.\n\n<image>"),
        ("llama_3", f"<|begin_of_text|>{AS_SYSTEM}Be brief.<|end_of_text|>{AS_USER}<image>"),
    ],
)
def test_the_template_places_the_system_message(name, start):
    messages = (Message.of("system", "Be brief."), *TWO_TURNS)
    assert as_text(messages, find_template(name)).startswith(start)


def test_an_empty_system_message_removes_the_block_in_the_user_turn():
    messages = (Message.of("system", ""), *TWO_TURNS)
    assert as_text(messages, find_template("llama_2")).startswith("[INST] <image>\nWhat? [/INST] A cat.")
    assert as_text(messages, find_template("vicuna_v1")) == as_text(TWO_TURNS, find_template("vicuna_v1_nosys"))


def test_user_text_is_content_also_where_it_spells_a_marker():
    spans = render((Message.of("user", "</s>USER: <image>{eos}"),), find_template("vicuna_v1"), prompt=True)
    assert [s.text for s in spans if s.kind == "content"] == ["</s>USER: <image>{eos}"]


@pytest.mark.parametrize(
    ("messages", "field", "value", "expected"),
    [
        ((), "messages", MISSING, None),
        ((Message.of("assistant", "hi"),), "messages[0]", "assistant", "user"),
        ((Message.of("user", "a"), Message.of("user", "b")), "messages[1]", "user", "assistant"),
        ((Message.of("user", "a"), Message.of("assistant", " ")), "messages[1]", MISSING, None),
        ((Message.of("system", "s"), *2 * (Message.of("user", "a"),)), "messages[2]", "user", "assistant"),
        ((Message.of("system", IMAGE), Message.of("user", "a")), "messages[0]", MISSING, None),
        ((Message.of("user", "a"),), "messages[0]", "user", "assistant"),
    ],
)  # fmt: skip
def test_an_invalid_conversation_is_an_error_with_the_index_of_the_message(messages, field, value, expected):
    with pytest.raises(TemplateError) as caught:
        render(messages, find_template("vicuna_v1"))
    error = caught.value
    assert (error.field, error.value, error.expected) == (field, value, expected)


ANY_ORDER = ["vicuna_v1", "vicuna_v1_nosys", "llava_v1", "v1_mmtag", "llava_v0", "v0_mmtag", "v0", "mpt", "hermes-2",
             "llama_3", "chatml"]  # fmt: skip
SYSTEM_ANYWHERE = ["mpt", "hermes-2", "chatml"]
ALTERNATING = ["llama_2", "llava_llama_2", "mistral", "starter_qa", "caption"]


def conversation(*turns):
    names = {"s": "system", "u": "user", "a": "assistant"}
    return tuple(Message.of(names[turn[0]], turn[1:]) for turn in turns)


def test_which_templates_mark_turns_and_system_texts():
    assert {name for name, template in TEMPLATES.items() if template.marks_turns} == set(ANY_ORDER)
    assert {name for name, template in TEMPLATES.items() if template.marks_system} == set(SYSTEM_ANYWHERE)
    assert {*ANY_ORDER, *ALTERNATING, "page"} == set(TEMPLATES)


@pytest.mark.parametrize("name", [*ANY_ORDER, *ALTERNATING])
def test_a_prompt_may_hold_an_empty_answer(name):
    template = find_template(name)
    full, empty = (
        as_text(conversation("uhello", f"a{answer}", "uand now?"), template, prompt=True) for answer in ("Yes.", "")
    )
    assert full.replace("Yes.", "") == empty


@pytest.mark.parametrize("name", ANY_ORDER)
@pytest.mark.parametrize(
    "turns",
    [("ua", "ub"), ("aHello!", "ua"), ("ua", "ab"), ("ua", "ab", "ac", "ud"), ("ss",), ("ss", "st", "aHello!", "ua")],
    ids=["two questions", "a greeting", "an answer last", "two answers", "system alone", "two systems and a greeting"],
)
def test_templates_that_mark_turns_accept_any_order_in_a_prompt(name, turns):
    template = find_template(name)
    text = as_text(conversation(*turns), template, prompt=True)
    marks = {"u": template.user_before, "a": template.assistant_before}
    place = 0
    for turn in turns:
        if turn[0] in marks:
            place = text.index(f"{marks[turn[0]]}{template.answer_lead if turn[0] == 'a' else ''}{turn[1:]}", place)
    assert text.endswith(template.assistant_before)
    if turns != ("ua", "ab"):
        with pytest.raises(TemplateError):
            render(conversation(*turns), template)


@pytest.mark.parametrize("name", SYSTEM_ANYWHERE)
def test_templates_that_mark_system_texts_accept_them_anywhere(name):
    template = find_template(name)
    block = f"{template.system_before}be brief{template.system_after}"
    for turns in (("ua", "ab", "sbe brief", "uc"), ("ua", "sbe brief")):
        assert as_text(conversation(*turns), template, prompt=True).count(block) == 1


def test_leading_system_messages_are_joined():
    one, two = conversation("sa\nb", "uc"), conversation("sa", "sb", "uc")
    for name in ("vicuna_v1", "llama_2", "chatml", "mistral"):
        assert as_text(one, find_template(name), prompt=True) == as_text(two, find_template(name), prompt=True)


@pytest.mark.parametrize(
    ("name", "turns", "index"),
    [
        *((name, ("ua", "ub"), 1) for name in ALTERNATING),
        *((name, ("aHello!", "ua"), 0) for name in ALTERNATING),
        *((name, ("ua", "ab"), 1) for name in ALTERNATING),
        *((name, ("ss", "ua", "ab", "st", "uc"), 3) for name in (*ALTERNATING, "vicuna_v1", "llama_3", "v0")),
        *((name, ("ss",), 0) for name in ALTERNATING),
    ],
)
def test_a_prompt_that_the_template_cannot_express_names_the_message(name, turns, index):
    with pytest.raises(TemplateError) as raised:
        render(conversation(*turns), find_template(name), prompt=True)
    assert raised.value.field == f"messages[{index}]"


def test_an_unknown_template_has_near_names():
    with pytest.raises(UnknownNameError) as caught:
        find_template("vicuna_v2")
    assert (caught.value.name, caught.value.near[0]) == ("vicuna_v2", "vicuna_v1")
