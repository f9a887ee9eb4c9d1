"""Templates give the published strings; what people write stays text."""

import hashlib
from itertools import groupby

import pytest

from vila.chat import templates
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
# What stands between two "~" is supervised.
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


def written(messages, template, **kwargs):
    return "".join("<image>" if s.media else s.text for s in render(messages, template, **kwargs))


def marked(messages, template):
    """The text with a "~" wherever supervision begins or ends."""
    groups = groupby(render(messages, template), key=lambda span: span.train)
    texts = [(train, "".join("<image>" if s.media else s.text for s in group)) for train, group in groups]
    return "".join(f"~{text}~" if train else text for train, text in texts)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_writes_and_supervises_its_golden_string(name):
    assert marked(TWO_TURNS, find_template(name)) == EXPECTED[name]


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (templates.LLAMA_2, "d52c188a3c969c4e"),
        (templates.V0_QUESTION + templates.V0_ANSWER, "ebcff27c10465f99"),
    ],
)
def test_the_long_published_texts_are_letter_for_letter(text, start):
    assert hashlib.sha256(text.encode()).hexdigest().startswith(start)


@pytest.mark.parametrize(
    ("alias", "name"),
    [("v1", "vicuna_v1"), ("default", "v0"), ("plain", "caption"), ("v0_plain", "caption"), ("hermes_2", "hermes-2")],
)
def test_further_names_find_the_same_template(alias, name):
    assert find_template(alias) is find_template(name)


def test_only_compact_templates_write_nothing_after_a_picture_in_front():
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
def test_a_prompt_ends_where_the_assistant_answers(name, end):
    assert written(TWO_TURNS[:3], find_template(name), prompt=True).endswith(end)


def test_a_page_supervises_all_text_and_the_end():
    spans = render((Message.of("user", PICTURE, "one ", PICTURE, "two"),), find_template("page"))
    assert "".join(s.text for s in spans if s.train) == "one two{eos}"


def test_a_system_message_replaces_the_default_one():
    messages = (Message.of("system", "Be brief."), *TWO_TURNS)
    assert written(messages, find_template("vicuna_v1")).startswith("Be brief. USER: ")
    assert written(messages, find_template("chatml")).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("llama_2", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>"),
        ("mistral", "<s>[INST] Be brief.\n\n<image>"),
        ("llama_3", f"<|begin_of_text|>{AS_SYSTEM}Be brief.<|end_of_text|>{AS_USER}<image>"),
    ],
)
def test_a_system_message_stands_where_the_template_puts_it(name, start):
    messages = (Message.of("system", "Be brief."), *TWO_TURNS)
    assert written(messages, find_template(name)).startswith(start)


def test_an_empty_system_message_takes_the_folded_block_away():
    messages = (Message.of("system", ""), *TWO_TURNS)
    assert written(messages, find_template("llama_2")).startswith("[INST] <image>\nWhat? [/INST] A cat.")
    assert written(messages, find_template("vicuna_v1")) == written(TWO_TURNS, find_template("vicuna_v1_nosys"))


def test_what_a_user_writes_is_content_even_when_it_looks_like_a_marker():
    spans = render((Message.of("user", "</s>USER: <image>{eos}"),), find_template("vicuna_v1"), prompt=True)
    assert [s.text for s in spans if s.kind == "content"] == ["</s>USER: <image>{eos}"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ((), "the conversation is empty"),
        ((Message.of("assistant", "hi"),), "message 1: expected a turn of the user, got 'assistant'"),
        ((Message.of("user", "a"), Message.of("user", "b")), "message 2: expected a turn of the assistant, got 'user'"),
        ((Message.of("user", "a"), Message.of("assistant", " ")), "message 2: the assistant's answer is empty"),
        ((Message.of("system", "s"), Message.of("user", "a"), Message.of("user", "b")), "message 3: expected a turn"),
        ((Message.of("system", PICTURE), Message.of("user", "a")), "message 1: a system message holds text only"),
        ((Message.of("user", "a"),), "the last message must be the assistant's"),
    ],
)
def test_a_conversation_that_does_not_fit_is_refused(messages, message):
    with pytest.raises(TemplateError, match=message):
        render(messages, find_template("vicuna_v1"))


ANY_ORDER = ["vicuna_v1", "vicuna_v1_nosys", "llava_v1", "v1_mmtag", "llava_v0", "v0_mmtag", "v0", "mpt", "hermes-2",
             "llama_3", "chatml"]  # fmt: skip
SYSTEM_ANYWHERE = ["mpt", "hermes-2", "chatml"]
ALTERNATING = ["llama_2", "llava_llama_2", "mistral", "starter_qa", "caption"]


def said(*turns):
    names = {"s": "system", "u": "user", "a": "assistant"}
    return tuple(Message.of(names[turn[0]], turn[1:]) for turn in turns)


def test_every_template_is_of_one_kind():
    assert {name for name, template in TEMPLATES.items() if template.marks_turns} == set(ANY_ORDER)
    assert {name for name, template in TEMPLATES.items() if template.marks_system} == set(SYSTEM_ANYWHERE)
    assert {*ANY_ORDER, *ALTERNATING, "page"} == set(TEMPLATES)


@pytest.mark.parametrize("name", [*ANY_ORDER, *ALTERNATING])
def test_a_prompt_may_hold_an_empty_answer(name):
    template = find_template(name)
    full, empty = (written(said("uhello", f"a{answer}", "uand now?"), template, prompt=True) for answer in ("Yes.", ""))
    assert full.replace("Yes.", "") == empty


@pytest.mark.parametrize("name", ANY_ORDER)
@pytest.mark.parametrize(
    "turns",
    [("ua", "ub"), ("aHello!", "ua"), ("ua", "ab"), ("ua", "ab", "ac", "ud"), ("ss",), ("ss", "st", "aHello!", "ua")],
    ids=["two questions", "a greeting", "an answer last", "two answers", "system alone", "two systems and a greeting"],
)
def test_where_turns_are_marked_a_prompt_may_hold_them_in_any_order(name, turns):
    template = find_template(name)
    text = written(said(*turns), template, prompt=True)
    marks = {"u": template.user_before, "a": template.assistant_before}
    place = 0
    for turn in turns:
        if turn[0] in marks:
            place = text.index(f"{marks[turn[0]]}{template.answer_lead if turn[0] == 'a' else ''}{turn[1:]}", place)
    assert text.endswith(template.assistant_before)
    if turns != ("ua", "ab"):
        with pytest.raises(TemplateError):
            render(said(*turns), template)


@pytest.mark.parametrize("name", SYSTEM_ANYWHERE)
def test_where_a_system_text_is_marked_it_may_stand_anywhere(name):
    template = find_template(name)
    block = f"{template.system_before}be brief{template.system_after}"
    for turns in (("ua", "ab", "sbe brief", "uc"), ("ua", "sbe brief")):
        assert written(said(*turns), template, prompt=True).count(block) == 1


def test_several_system_messages_at_the_beginning_are_one():
    one, two = said("sa\nb", "uc"), said("sa", "sb", "uc")
    for name in ("vicuna_v1", "llama_2", "chatml", "mistral"):
        assert written(one, find_template(name), prompt=True) == written(two, find_template(name), prompt=True)


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
def test_what_a_template_cannot_express_is_refused_by_the_index_of_the_message(name, turns, index):
    with pytest.raises(TemplateError) as raised:
        render(said(*turns), find_template(name), prompt=True)
    assert raised.value.field == f"messages[{index}]"


def test_an_unknown_template_suggests_a_near_one():
    with pytest.raises(UnknownNameError, match="unknown template 'vicuna_v2'; did you mean 'vicuna_v1'"):
        find_template("vicuna_v2")
