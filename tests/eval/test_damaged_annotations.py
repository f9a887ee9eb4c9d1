"""Annotation files with a value of the wrong type: the error names file, record, field and value."""

import json
from pathlib import Path

import pytest

from tests.eval.checks import refused
from tests.eval.mini_datasets import truly, write_mini_datasets
from vila.eval.annotations import OPTIONAL, check_fields
from vila.eval.benchmark import BENCHMARKS
from vila.eval.predictions import predicted_answers

VQA = "vqav2/v2_mscoco_val2014_annotations.json"
VIZ = "vizwiz/val.json"
GQA = "gqa/testdev_balanced_questions.json"
SEED = "seed_bench/SEED-Bench.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = write_mini_datasets(tmp_path_factory.mktemp("eval"))
    humans = [{"answer": "red", "answer_id": number} for number in range(10)]
    row = {"question_id": 1000, "image_id": 1, "question_type": "what", "answer_type": "other", "answers": humans}
    (folder / VQA).write_text(json.dumps({"annotations": [row, {**row, "question_id": 1001}]}))
    rows = [
        {
            "image": f"VizWiz_test_{number:08d}.jpg",
            "question": "what is this",
            "answer_type": "other",
            "answers": humans,
        }
        for number in range(3)
    ]
    (folder / VIZ).write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize(
    ("name", "file", "place", "value", "record", "field"),
    [
        ("vqav2", VQA, ("annotations", 0), 5, "question None", None),
        ("vqav2", VQA, ("annotations", 1, "question_type"), None, "question 1001", "question_type"),
        ("vqav2", VQA, ("annotations", 0, "answers"), 5, "question 1000", "answers"),
        ("vizwiz", VIZ, (1, "image"), None, "row 2", "image"),
        ("vizwiz", VIZ, (0, "question"), 5, "row 1", "question"),
        ("vizwiz", VIZ, (0, "answers"), True, "row 1", "answers"),
        ("gqa", GQA, ("201301000", "types", "structural"), 5, "question 201301000", "structural"),
        ("gqa", GQA, ("201301000", "groups", "global"), [], "question 201301000", "global"),
        ("textvqa", "textvqa/TextVQA_0.5.1_val.json", ("data", 0, "answers"), 5, "row 1", "answers"),
        ("scienceqa", "scienceqa/pid_splits.json", ("test", 1), [], "test 2", None),
        ("scienceqa", "scienceqa/llava_test_CQM-A.json", (0, "image"), None, "row 1", "image"),
        ("seed", SEED, ("question_type", "Scene Understanding"), None, "question_type", "Scene Understanding"),
        ("seed", SEED, ("questions", 0, "data_type"), [], "question 1", "data_type"),
        ("seed", SEED, ("questions", 0, "question_type_id"), {}, "question 1", "question_type_id"),
    ],
)
def test_value_of_another_type_is_named(whole, name, file, place, value, record, field):
    path = whole / file
    before = path.read_text()
    content = inner = json.loads(before)
    answers = predicted_answers(items := BENCHMARKS[name](whole, 0).items(), {i.id: truly(0, i) for i in items})
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    path.write_text(json.dumps(content))
    try:
        with refused(file=path.name, record=record, field=field):
            benchmark = BENCHMARKS[name](whole, 0)
            benchmark.items()
            benchmark.score(answers)
    finally:
        path.write_text(before)


def test_bool_is_no_integer_and_absent_fields_are_accepted():
    with refused(file="a.json", record="row 1", field="count", value=True):
        check_fields({"count": True}, Path("a.json"), "row 1", count=int)
    check_fields({"row": "x"}, Path("a.json"), "row 1", row=str, other=(int, OPTIONAL))
