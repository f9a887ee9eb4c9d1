"""Stage data: true to the training questions, balanced, and disjoint from validation and test."""

import json
import random
from collections import Counter

import pytest

from tests.starter.tiny_run import write_easy_vqa
from vila.data.formats.base import FORMATS
from vila.starter.data import (
    ShapeImage,
    is_validation,
    labelled_images,
    page_records,
    question_record,
    question_wordings,
    write_stage_data,
)
from vila.starter.easy_vqa import answer_to, group_by_image, read_questions


@pytest.fixture(scope="module")
def easy_vqa(tmp_path_factory):
    return write_easy_vqa(tmp_path_factory.mktemp("easy") / "vqa")


@pytest.fixture(scope="module")
def written(easy_vqa, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_stage_data(easy_vqa, folder, seed=0)
    return folder


def test_answers_follow_from_the_truth():
    assert answer_to("what color is the circle?", "circle", "teal") == "teal"
    assert answer_to("what color is the circle?", "triangle", "teal") is None
    assert answer_to("what is the red shape?", "triangle", "red") == "triangle"
    assert answer_to("is there a red shape?", "circle", "red") == "yes"
    assert answer_to("is there not a red shape?", "circle", "red") == "no"
    assert answer_to("is no red shape present?", "circle", "blue") == "yes"


def test_derived_answers_agree_with_every_training_question(easy_vqa):
    groups = group_by_image(read_questions(easy_vqa, "train"))
    for truth in labelled_images(groups):
        for question in groups[truth.image_id]:
            assert answer_to(question.text, truth.shape, truth.colour) == question.answer


def test_every_stage_file_reads_as_samples(written, easy_vqa):
    for name in ("1_align", "2_pretrain", "3_sft", "text"):
        source = FORMATS["messages"].open(written / f"{name}.jsonl", easy_vqa / "train" / "images")
        assert len(source) == json.loads((written / "counts.json").read_text())[name] > 0
        assert all(source[i].messages for i in range(len(source)))


def test_held_out_images_are_in_no_stage(written, easy_vqa):
    for name in ("1_align", "2_pretrain", "3_sft"):
        source = FORMATS["messages"].open(written / f"{name}.jsonl", easy_vqa / "train" / "images")
        shown = {int(item.source.stem) for i in range(len(source)) for item in source[i].media}
        assert shown
        assert not any(map(is_validation, shown))


def test_pages_hold_two_to_four_images_and_every_image_once():
    truths = [ShapeImage(n, "circle", "red") for n in range(50)]
    pages = page_records(truths, random.Random(0))
    counts = [sum(part["type"] == "image" for part in page["messages"][0]["content"]) for page in pages]
    assert sum(counts) == 50
    assert set(counts[:-1]) <= {2, 3, 4}


def test_questions_are_balanced_over_kinds_and_answers(easy_vqa):
    forms = question_wordings(group_by_image(read_questions(easy_vqa, "train")))
    answers = Counter()
    for seed in range(100):
        row = question_record(ShapeImage(1, "circle", "red"), forms, random.Random(seed))
        assert len(row["branches"]) == 8
        answers.update(branch[1]["content"] for branch in row["branches"])
    assert 0.3 < answers["yes"] / (answers["yes"] + answers["no"]) < 0.7


def test_the_same_seed_writes_the_same_files(easy_vqa, written, tmp_path):
    write_stage_data(easy_vqa, tmp_path, seed=0)
    for file in written.glob("*.jsonl"):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
