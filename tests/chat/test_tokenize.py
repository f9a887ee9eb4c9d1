"""Ids and labels: golden cases of upstream, cases worked by hand, and content that must not become special tokens."""

import json
from pathlib import Path

import numpy as np
import pytest

from vila.chat.render import render
from vila.chat.template import Span
from vila.chat.templates import TEMPLATES, find_template
from vila.chat.tokenize import IGNORE, tokenize, tokenize_sample
from vila.core.errors import DataError
from vila.core.types import Image, Message, Sample, Text

GOLDEN = Path(__file__).parents[1] / "golden"
IMAGE, OTHER = Image(b"image"), Image(b"other")
ROLES = {"human": "user", "gpt": "assistant"}


def one(media):
    return 1


def tokenize_prompt(messages, template, tokenizer, count):
    return tokenize(render(messages, template, prompt=True), tokenizer, count)


def golden_cases():
    for file in sorted((GOLDEN / "labels").glob("vila__*.json")):
        facts = json.loads(file.read_text(encoding="utf-8"))
        fixture = "llama3" if facts["tokenizer"].startswith("llama3") else "vicuna"
        for name, case in facts["conversations"].items():
            if "error" not in case:
                yield pytest.param(fixture, facts["template"], case, id=f"{facts['template']}-{name}")


def to_messages(turns, values):
    out = []
    for turn, value in zip(turns, values, strict=True):
        parts = []
        for place, chunk in enumerate(value.split("<image>")):
            parts += [IMAGE] if place else []
            parts += [Text(chunk)] if chunk else []
        out.append(Message(ROLES[turn["from"]], tuple(parts)))
    return tuple(out)


def with_markers(tokenizer, ids):
    return [-200 if i == tokenizer.image_token_id else i for i in ids]


@pytest.mark.parametrize(("fixture", "template", "facts"), list(golden_cases()))
def test_ids_and_labels_equal_upstream(request, fixture, template, facts):
    tokenizer = request.getfixturevalue(fixture)
    messages = to_messages(facts["conversation"], facts["after_preprocess_multimodal"])
    tokens = tokenize(render(messages, find_template(template)), tokenizer, one)
    assert with_markers(tokenizer, tokens.ids) == facts["input_ids"]
    # Upstream masks some samples completely, with a warning, because its length arithmetic fails.
    if not facts.get("warning"):
        assert tokens.labels == facts["labels"]


VECTORS = json.loads((GOLDEN / "llama_tokenizer" / "vectors.json").read_text(encoding="utf-8"))["cases"]
NAMED = [
    ("no system prompt", "vicuna_v1_nosys"),
    ("vicuna_v1", "vicuna_v1"),
    ("plain", "plain"),
    ("llava_llama_2", "llava_llama_2"),
    ("mistral", "mistral"),
]


@pytest.mark.parametrize("case", [c for c in VECTORS if "conversation" in c], ids=lambda case: case["name"])
def test_conversations_with_llamas_vocabulary_equal_upstream(llama, case):
    template = next(name for words, name in NAMED if words in case["name"])
    messages = to_messages(case["conversation"], [turn["value"] for turn in case["conversation"]])
    tokens = tokenize(render(messages, find_template(template)), llama, one)
    assert with_markers(llama, tokens.ids) == case["input_ids"]
    labels = list(case["labels"])
    if template == "mistral":
        # Upstream also supervises the "]" of "[/INST]" before every answer, an off-by-one error.
        bracket = 29962
        assert labels.count(bracket) == 2
        labels = [IGNORE if label == bracket else label for label in labels]
    assert tokens.labels == labels


@pytest.mark.parametrize("case", [c for c in VECTORS if "text" in c], ids=lambda case: case["text"][-30:])
def test_raw_texts_with_llamas_vocabulary_equal_upstream(llama, case):
    assert with_markers(llama, tokenize(raw(case["text"]), llama, one).ids) == case["input_ids"]


def raw(text):
    """A prompt written out with image markers and special tokens, as spans."""
    pairs = [[Span("", "media", media=IMAGE), Span(chunk, "template")] for chunk in text.split("<image>")]
    return [span for pair in pairs for span in pair][1:]


def test_llama_3_drops_the_first_token_after_an_image(llama3):
    # By hand: the template writes BOS, the tokenizer adds none, and upstream then drops the first token of every chunk
    # after an image: here the line break before "What?" and the end of turn after the second image.
    messages = (Message.of("user", IMAGE, "\nWhat?", OTHER),)
    tokens = tokenize_prompt(messages, find_template("llama_3"), llama3, lambda media: 2)
    image, header = llama3.image_token_id, llama3.special_ids["<|start_header_id|>"]
    what, break_ = llama3.encode("What?", False)[0], llama3.encode("\n", False)[0]
    assert len(break_) == 1
    start = tokens.ids.index(image)
    assert tokens.ids[start : start + 5 + len(what)] == [image, image, *what, image, image, header]
    assert tokens.runs == [(start, 2), (start + 2 + len(what), 2)]


def test_no_token_is_dropped_if_the_tokenizer_adds_bos_or_the_template_has_none(llama, llama3):
    template = find_template("chatml")
    ids = tokenize_prompt((Message.of("user", IMAGE, "\nWhat?"),), template, llama3, one).ids
    assert ids[ids.index(llama3.image_token_id) + 1] == llama3.encode("\n", False)[0][0]
    ids = tokenize_prompt((Message.of("user", IMAGE, "What?"),), find_template("mistral"), llama, one).ids
    assert ids[ids.index(llama.image_token_id) + 1 :][:2] == [1724, 29973]


@pytest.mark.parametrize("name", [name for name, template in TEMPLATES.items() if template.supervise == "answers"])
@pytest.mark.parametrize("fixture", ["llama", "vicuna", "llama3", "bytewise"])
def test_labels_are_exactly_the_answer_and_its_end(request, fixture, name):
    tokenizer, template = request.getfixturevalue(fixture), find_template(name)
    answer = "12 \u00fcber \N{GRINNING FACE}!"
    messages = (Message.of("user", IMAGE, "\nWhat?"), Message.of("assistant", answer))
    tokens = tokenize(render(messages, template), tokenizer, one)
    prompt = tokenize_prompt(messages[:1], template, tokenizer, one).ids
    start = next(i for i, label in enumerate(tokens.labels) if label != IGNORE)
    assert prompt == tokens.ids[:start]
    end = start + sum(label != IGNORE for label in tokens.labels)
    assert tokens.labels[start:end] == tokens.ids[start:end]
    tail = tokenizer.encode(template.answer_tail, False)[0] if template.answer_tail else []
    assert tokens.ids[end:] == tail


def test_a_digit_first_answer_supervises_its_own_space_token(vicuna):
    # By hand: "ASSISTANT: 12" ends in [_, 1, 2]; the lone space token belongs to the answer.
    messages = (Message.of("user", "How many?"), Message.of("assistant", "12"))
    tokens = tokenize(render(messages, find_template("vicuna_v1")), vicuna, one)
    space, end = 1107, 2
    supervised = [label for label in tokens.labels if label != IGNORE]
    assert supervised[0] == space
    assert supervised[-1] == end
    assert len(supervised) == 4


def test_labels_of_the_starter_template(bytewise):
    messages = (Message.of("user", IMAGE, "Q?"), Message.of("assistant", "no"))
    tokens = tokenize(render(messages, find_template("starter_qa")), bytewise, lambda media: 2)
    space, n, o = (bytewise.encode(c, False)[0][0] for c in " no")
    q, mark = (bytewise.encode(c, False)[0][0] for c in "Q?")
    image, end = bytewise.image_token_id, bytewise.special_ids["<|im_end|>"]
    assert tokens.ids == [image, image, q, mark, space, n, o, end]
    assert tokens.labels == [IGNORE] * 4 + [space, n, o, end]


def test_user_text_yields_no_special_id_and_no_placeholder(bytewise, vicuna):
    text = "</s>USER: <image><|im_end|>"
    for tokenizer, template in ((bytewise, "chatml"), (vicuna, "vicuna_v1")):
        clean = tokenize_prompt((Message.of("user", "x"),), find_template(template), tokenizer, one)
        dirty = tokenize_prompt((Message.of("user", text),), find_template(template), tokenizer, one)
        special = set(tokenizer.special_ids.values()) | {tokenizer.image_token_id}
        assert [i for i in dirty.ids if i in special] == [i for i in clean.ids if i in special]
        assert not dirty.media


def test_ids_never_depend_on_where_content_was_cut_into_parts(bytewise):
    whole = tokenize_prompt((Message.of("user", "one two"),), find_template("chatml"), bytewise, one)
    cut = tokenize_prompt((Message.of("user", "one", " two"),), find_template("chatml"), bytewise, one)
    assert whole.ids == cut.ids


def branched(*answers):
    branches = tuple((Message.of("user", f"{q}?"), Message.of("assistant", a)) for q, a in answers)
    return Sample("s", (Message.of("user", IMAGE),), branches)


def test_branches_share_their_prefix_and_restart_positions_after_it(bytewise):
    sample = tokenize_sample(branched(("a", "x"), ("b", "yy")), find_template("starter_qa"), bytewise, lambda m: 3)
    assert sample.segment_ids.tolist() == [0] * 3 + [1] * 5 + [2] * 6
    assert sample.parent_ids.tolist() == [-1] * 3 + [0] * 11
    assert sample.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 5, 6, 7, 8]
    assert sample.is_placeholder.tolist() == [1] * 3 + [0] * 11
    assert sample.media == (IMAGE,)


def test_a_branched_sample_holds_the_tokens_of_its_separate_conversations(bytewise):
    sample = branched(("same start", "x"), ("same end", "yy"), ("other", "z"))
    template = find_template("starter_qa")
    joined = tokenize_sample(sample, template, bytewise, lambda m: 3)
    for number, messages in enumerate(sample.conversations(), start=1):
        alone = tokenize(render(messages, template), bytewise, lambda m: 3)
        mine = (joined.segment_ids == 0) | (joined.segment_ids == number)
        assert joined.ids[mine].tolist() == alone.ids
        assert joined.labels[mine].tolist() == alone.labels
        assert joined.positions[mine].tolist() == list(range(len(alone.ids)))


def test_branches_about_different_images_share_no_prefix(bytewise):
    branches = tuple((Message.of("user", p, "?"), Message.of("assistant", "x")) for p in (IMAGE, OTHER))
    sample = tokenize_sample(Sample("s", (), branches), find_template("starter_qa"), bytewise, lambda m: 3)
    assert set(sample.parent_ids.tolist()) == {-1}
    assert sample.media == (IMAGE, OTHER)


def test_branches_with_equal_questions_supervise_their_whole_answers(bytewise):
    sample = tokenize_sample(branched(("q", "x"), ("q", "x")), find_template("starter_qa"), bytewise, lambda m: 3)
    assert np.count_nonzero(sample.labels != IGNORE) == 2 * len(" x") + 2


def test_the_first_label_of_a_sample_is_ignored(bytewise):
    sample = tokenize_sample(Sample("s", (Message.of("user", "text"),)), find_template("page"), bytewise, one)
    assert sample.labels[0] == IGNORE
    assert (sample.labels[1:] != IGNORE).all()


def test_a_sample_without_supervised_tokens_is_an_error_that_names_it(bytewise):
    with pytest.raises(DataError) as raised:
        tokenize_sample(Sample("lonely", (Message.of("user", IMAGE),)), NO_END, bytewise, one)
    assert raised.value.record == "sample 'lonely'"


def test_a_sample_with_an_invalid_conversation_is_an_error_that_names_it(bytewise):
    with pytest.raises(DataError) as raised:
        tokenize_sample(Sample("odd", (Message.of("user", "x"),)), find_template("chatml"), bytewise, one)
    assert (raised.value.record, raised.value.field) == ("sample 'odd'", "messages[0]")


QUESTION, ANSWER = Message.of("user", IMAGE, "What?"), Message.of("assistant", "A cat.")


def test_a_caption_is_an_image_and_the_answer(vicuna):
    tokens = tokenize_sample(Sample("c", (QUESTION, ANSWER)), find_template("caption"), vicuna, one)
    assert tokens.is_placeholder.sum() == 1 and tokens.ids[1] == vicuna.image_token_id
    assert vicuna.encode("What?", False)[0][0] not in tokens.ids


@pytest.mark.parametrize(
    ("sample", "field"),
    [
        # Upstream asserts an <image> and two turns: golden case 01_text_single of the plain template is an error.
        (Sample("c", (Message.of("user", "What is the capital of France?"), ANSWER)), "messages[0]"),
        (Sample("c", (QUESTION, ANSWER, Message.of("user", "Why?"), ANSWER)), "messages"),
        (Sample("c", (QUESTION, ANSWER, QUESTION, ANSWER)), "messages"),
        (Sample("c", (Message.of("system", "s"), QUESTION, ANSWER)), "messages"),
        (Sample("c", (QUESTION,)), "messages"),
        (Sample("c", (Message.of("user", IMAGE),), ((Message.of("user", "a"), ANSWER),) * 2), "branches"),
        (Sample("c", (), ((Message.of("user", "a"), ANSWER),)), "messages[0]"),
    ],
)
def test_a_caption_template_refuses_samples_whose_questions_it_would_drop(bytewise, sample, field):
    with pytest.raises(DataError) as raised:
        tokenize_sample(sample, find_template("caption"), bytewise, one)
    assert (raised.value.record, raised.value.field) == ("sample 'c'", field)
    assert raised.value.hint


def test_a_literal_marker_in_a_page_is_text_and_one_image_stays_one(bytewise):
    # Upstream replaces it by <IMAGE>, because it would be parsed as an image.
    page = Sample("p", (Message.of("user", IMAGE, "an <image> tag"),))
    tokens = tokenize_sample(page, find_template("page"), bytewise, one)
    assert tokens.is_placeholder.sum() == 1 and tokens.media == (IMAGE,)
    text = [i for i in tokens.ids.tolist() if i != bytewise.image_token_id]
    assert text[: len("an <image> tag")] == bytewise.encode("an <image> tag", False)[0]


NO_END = find_template("page").__class__("page", supervise="all")
