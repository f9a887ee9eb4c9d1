"""Jinja chat templates render as our renderer, and give equal ids with stock tokenizers."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError as JinjaError
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from tests.chat.conftest import GOLDEN
from vila.chat.content import parse_messages
from vila.chat.jinja import chat_template
from vila.chat.render import render
from vila.chat.templates import TEMPLATES
from vila.chat.tokenize import tokenize

IMAGE = {"type": "image", "path": "a.png"}
FRAMES = {"type": "video", "path": "a.mp4"}
bits = st.sampled_from(
    [" ", "\n", "What?", " is", "12", "\N{GRINNING FACE}", "{{ x }}", "{% if %}", "'\"\\n", "&lt;$x"]
)
texts = st.lists(bits, max_size=4).map("".join)
parts = st.lists(st.just(IMAGE) | st.just(FRAMES) | texts.map(lambda text: {"type": "text", "text": text}), max_size=5)
answers = texts.map(lambda text: f"{text}a{text}")


@st.composite
def conversations(draw):
    """A conversation, and whether it is a prompt (ends with the user's turn)."""
    turns = draw(st.integers(1, 3))
    rows = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for _ in range(turns):
        answer = draw(answers | answers.map(lambda text: [{"type": "text", "text": text}]))
        rows += [{"role": "user", "content": draw(texts | parts)}, {"role": "assistant", "content": answer}]
    prompt = draw(st.booleans())
    return rows[:-1] if prompt else rows, prompt


def by_renderer(rows, template, prompt):
    text = "".join("<image>" if s.media else s.text for s in render(parse_messages(rows), template, prompt=prompt))
    return text.replace("{bos}", "<s>").replace("{eos}", "</s>")


def by_jinja(rows, source, prompt, **kwargs):
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return render_jinja_template([rows], chat_template=source, add_generation_prompt=prompt, **tokens, **kwargs)[0][0]


LAST = [{"role": "user", "content": [{"type": "text", "text": "See"}, IMAGE]}]
WELL_KNOWN = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "\nWhat?"}]}]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(conversations())
def test_jinja_and_renderer_give_equal_text(name, conversation):
    rows, prompt = conversation
    assert by_jinja(rows, chat_template(TEMPLATES[name]), prompt) == by_renderer(rows, TEMPLATES[name], prompt)


def test_parts_may_be_plain_strings_and_the_marker_may_differ():
    rows = [{"role": "user", "content": [IMAGE, "\nWhat?"]}]
    source = chat_template(TEMPLATES["llava_v1"], image_marker="<|vision|>")
    assert by_jinja(rows, source, True).endswith("USER: <|vision|>\nWhat? ASSISTANT:")


def test_roles_that_do_not_alternate_are_rejected():
    with pytest.raises(JinjaError):
        by_jinja(WELL_KNOWN * 2, chat_template(TEMPLATES["vicuna_v1"]), True)


def test_a_tokenizer_without_bos_or_eos_can_use_it():
    source = chat_template(TEMPLATES["chatml"], after_image_space=True)
    text = render_jinja_template([WELL_KNOWN], chat_template=source, add_generation_prompt=True)[0][0]
    assert text == "<|im_start|>user\n<image> \nWhat?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(conversation=conversations())
@example(conversation=(WELL_KNOWN, True))
def test_with_after_image_space_a_stock_llama_tokenizer_gives_equal_ids(stock_llama, llama, name, bos, conversation):
    rows, prompt = conversation
    text = by_jinja(rows, chat_template(TEMPLATES[name], after_image_space=True, bos=bos), prompt)
    ids = stock_llama(text, add_special_tokens=not bos)["input_ids"]
    tokens = tokenize(render(parse_messages(rows), TEMPLATES[name], prompt=prompt), llama, lambda medium: 1)
    marker = stock_llama.convert_tokens_to_ids("<image>")
    assert [-200 if i == marker else i for i in ids] == [-200 if i == llama.image_token_id else i for i in tokens.ids]


@pytest.mark.parametrize(("name", "content"), [("chatml", WELL_KNOWN[0]["content"]), ("llama_3", "What?")])
def test_byte_level_tokenizers_need_no_space(llama3, name, content):
    # llama_3 without an image: the token dropped after an image (lost_after_media) cannot be expressed as text.
    stock = AutoTokenizer.from_pretrained(GOLDEN / "tokenizers" / "llama3_bytelevel_nobos")
    stock.add_special_tokens({"additional_special_tokens": ["<image>"]})
    rows = [{"role": "user", "content": content}]
    marker = stock.convert_tokens_to_ids("<image>")
    ids = stock(by_jinja(rows, chat_template(TEMPLATES[name]), True), add_special_tokens=False)["input_ids"]
    tokens = tokenize(render(parse_messages(rows), TEMPLATES[name], prompt=True), llama3, lambda medium: 1)
    assert [llama3.image_token_id if i == marker else i for i in ids] == tokens.ids


@pytest.mark.parametrize("bos", [False, True])
def test_there_is_no_space_between_an_image_and_a_special_token(stock_llama, llama, bos):
    source = chat_template(TEMPLATES["page"], after_image_space=True, bos=bos)
    text = by_jinja(LAST, source, False)
    assert text == ("<s> " if bos else "") + "See<image></s>"
    ids = stock_llama(text, add_special_tokens=not bos)["input_ids"]
    tokens = tokenize(render(parse_messages(LAST), TEMPLATES["page"]), llama, lambda medium: 1)
    assert [*ids[:2], ids[3]] == [*tokens.ids[:2], tokens.ids[3]] == [1, 2823, 2]


def test_ids_differ_without_the_space_after_an_image(stock_llama):
    rows, plain = WELL_KNOWN, chat_template(TEMPLATES["vicuna_v1"])
    with_space = chat_template(TEMPLATES["vicuna_v1"], after_image_space=True)
    what = [29871, 13, 5618, 29973]
    after = {}
    for source in (plain, with_space):
        ids = stock_llama(by_jinja(rows, source, True))["input_ids"]
        after[source] = ids[ids.index(stock_llama.convert_tokens_to_ids("<image>")) + 1 :][:4]
    assert after[with_space] == what
    assert after[plain] != what


def test_apply_chat_template_of_the_tokenizer_gives_equal_ids(stock_llama, llama):
    source = chat_template(TEMPLATES["vicuna_v1"], after_image_space=True, bos=True)
    ids = stock_llama.apply_chat_template(WELL_KNOWN, chat_template=source, add_generation_prompt=True)["input_ids"]
    tokens = tokenize(render(parse_messages(WELL_KNOWN), TEMPLATES["vicuna_v1"], prompt=True), llama, lambda medium: 1)
    marker = stock_llama.convert_tokens_to_ids("<image>")
    assert [llama.image_token_id if i == marker else i for i in ids] == tokens.ids
