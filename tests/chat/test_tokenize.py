"""Ids and labels: the original's own cases, hand-worked ones, and what must never become special."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests import tiny
from vila.chat.render import render
from vila.chat.templates import find_template
from vila.chat.tokenize import IGNORE, SpanTokenizer, tokenize, tokenize_prompt, tokenize_sample
from vila.core.errors import DataError
from vila.core.types import Image, Message, Sample, Text

GOLDEN = Path(__file__).parents[1] / "golden"
PICTURE, OTHER = Image(b"picture"), Image(b"other")
ROLES = {"human": "user", "gpt": "assistant"}


@pytest.fixture(scope="module")
def vicuna():
    return SpanTokenizer(AutoTokenizer.from_pretrained(GOLDEN / "tokenizers" / "vicuna_v15_legacy_false"))


@pytest.fixture(scope="module")
def bytewise():
    return SpanTokenizer(tiny.tokenizer())


def one(media):
    return 1


def golden_cases():
    for name, template in (("v1", "vicuna_v1"), ("plain", "caption")):
        file = json.loads((GOLDEN / "labels" / f"vila__{name}__vicuna_v15_legacy_false.json").read_text())
        for case, facts in file["conversations"].items():
            if "error" not in facts:
                yield pytest.param(template, facts, id=f"{template}-{case}")


def messages_of(facts):
    out = []
    for turn, value in zip(facts["conversation"], facts["after_preprocess_multimodal"], strict=True):
        parts = []
        for place, chunk in enumerate(value.split("<image>")):
            parts += [PICTURE] if place else []
            parts += [Text(chunk)] if chunk else []
        out.append(Message(ROLES[turn["from"]], tuple(parts)))
    return tuple(out)


@pytest.mark.parametrize(("template", "facts"), list(golden_cases()))
def test_ids_and_labels_equal_the_originals(vicuna, template, facts):
    tokens = tokenize(render(messages_of(facts), find_template(template)), vicuna, one)
    assert [-200 if i == vicuna.image_token_id else i for i in tokens.ids] == facts["input_ids"]
    assert tokens.labels == facts["labels"]


def test_a_digit_first_answer_supervises_its_own_space_token(vicuna):
    # Hand-worked: "ASSISTANT: 12" ends in [_, 1, 2]; the lone space token belongs to the answer.
    messages = (Message.of("user", "How many?"), Message.of("assistant", "12"))
    tokens = tokenize(render(messages, find_template("vicuna_v1")), vicuna, one)
    space, end = 1107, 2
    supervised = [label for label in tokens.labels if label != IGNORE]
    assert supervised[0] == space
    assert supervised[-1] == end
    assert len(supervised) == 4


def test_hand_worked_labels_of_the_starter_template(bytewise):
    messages = (Message.of("user", PICTURE, "Q?"), Message.of("assistant", "no"))
    tokens = tokenize(render(messages, find_template("starter_qa")), bytewise, lambda media: 2)
    space, n, o = (bytewise.encode(c, False)[0][0] for c in " no")
    q, mark = (bytewise.encode(c, False)[0][0] for c in "Q?")
    slot, end = bytewise.image_token_id, bytewise.special_ids["<|im_end|>"]
    assert tokens.ids == [slot, slot, q, mark, space, n, o, end]
    assert tokens.labels == [IGNORE] * 4 + [space, n, o, end]


def test_what_a_user_writes_yields_no_special_id_and_no_slot(bytewise, vicuna):
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
    return Sample("s", (Message.of("user", PICTURE),), branches)


def test_branches_share_their_prefix_and_restart_positions_after_it(bytewise):
    sample = tokenize_sample(branched(("a", "x"), ("b", "yy")), find_template("starter_qa"), bytewise, lambda m: 3)
    assert sample.segments.tolist() == [0] * 3 + [1] * 5 + [2] * 6
    assert sample.parents.tolist() == [-1] * 3 + [0] * 11
    assert sample.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 5, 6, 7, 8]
    assert sample.slots.tolist() == [1] * 3 + [0] * 11
    assert sample.media == (PICTURE,)


def test_the_parts_of_a_branched_sample_are_its_separate_conversations(bytewise):
    sample = branched(("same start", "x"), ("same end", "yy"), ("other", "z"))
    template = find_template("starter_qa")
    joined = tokenize_sample(sample, template, bytewise, lambda m: 3)
    for number, messages in enumerate(sample.conversations(), start=1):
        alone = tokenize(render(messages, template), bytewise, lambda m: 3)
        mine = (joined.segments == 0) | (joined.segments == number)
        assert joined.ids[mine].tolist() == alone.ids
        assert joined.labels[mine].tolist() == alone.labels
        assert joined.positions[mine].tolist() == list(range(len(alone.ids)))


def test_branches_about_different_pictures_share_nothing(bytewise):
    branches = tuple((Message.of("user", p, "?"), Message.of("assistant", "x")) for p in (PICTURE, OTHER))
    sample = tokenize_sample(Sample("s", (), branches), find_template("starter_qa"), bytewise, lambda m: 3)
    assert set(sample.parents.tolist()) == {-1}
    assert sample.media == (PICTURE, OTHER)


def test_equal_questions_still_predict_their_whole_answers(bytewise):
    sample = tokenize_sample(branched(("q", "x"), ("q", "x")), find_template("starter_qa"), bytewise, lambda m: 3)
    assert np.count_nonzero(sample.labels != IGNORE) == 2 * len(" x") + 2


def test_the_first_label_of_a_sample_is_ignored(bytewise):
    sample = tokenize_sample(Sample("s", (Message.of("user", "text"),)), find_template("page"), bytewise, one)
    assert sample.labels[0] == IGNORE
    assert (sample.labels[1:] != IGNORE).all()


def test_a_sample_without_supervision_is_an_error_that_names_it(bytewise):
    with pytest.raises(DataError, match="sample 'lonely': no token is supervised under template 'page'"):
        tokenize_sample(Sample("lonely", (Message.of("user", PICTURE),)), NO_END, bytewise, one)


def test_a_sample_that_does_not_fit_the_template_is_an_error_that_names_it(bytewise):
    with pytest.raises(
        DataError, match=r"sample 'odd': the last message must be the assistant's \(template 'chatml'\)"
    ):
        tokenize_sample(Sample("odd", (Message.of("user", "x"),)), find_template("chatml"), bytewise, one)


NO_END = find_template("page").__class__("page", supervise="all")
