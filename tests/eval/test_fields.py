"""Annotation files with a value of another kind: the file, the row, the field and its value are named."""

import json

import pytest

from tests.eval.mini import mini_data, truly
from vila.core.errors import DataError
from vila.eval.annotations import field_problem
from vila.eval.benchmark import BENCHMARKS
from vila.eval.predictions import predicted_answers

VQA = "vqav2/v2_mscoco_val2014_annotations.json"
VIZ = "vizwiz/val.json"
GQA = "gqa/testdev_balanced_questions.json"
SEED = "seed_bench/SEED-Bench.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = mini_data(tmp_path_factory.mktemp("eval"))
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
    ("name", "file", "place", "value", "message"),
    [
        ("vqav2", VQA, ("annotations", 0), 5, "question None has no question_id, image_id, question_type"),
        (
            "vqav2",
            VQA,
            ("annotations", 1, "question_type"),
            None,
            "question 1001: question_type is 'None'; expected text",
        ),
        ("vqav2", VQA, ("annotations", 0, "answers"), 5, "question 1000 has no readable answers: '5'"),
        ("vizwiz", VIZ, (1, "image"), None, "val.json row 2: image is 'None'; expected text"),
        ("vizwiz", VIZ, (0, "question"), 5, "val.json row 1: question is '5'; expected text"),
        ("vizwiz", VIZ, (0, "answers"), True, "has no readable answers: 'True'"),
        ("gqa", GQA, ("201301000", "types", "structural"), 5, "question 201301000: structural is '5'; expected text"),
        ("gqa", GQA, ("201301000", "groups", "global"), [], r"global is '\[\]'; expected text or nothing"),
        ("textvqa", "textvqa/TextVQA_0.5.1_val.json", ("data", 0, "answers"), 5, "has no readable answers: '5'"),
        (
            "scienceqa",
            "scienceqa/pid_splits.json",
            ("test", 1),
            [],
            r"pid_splits.json test 2: id is '\[\]'; expected text",
        ),
        ("scienceqa", "scienceqa/llava_test_CQM-A.json", (0, "image"), None, "row 1: image is 'None'; expected text"),
        ("seed", SEED, ("question_type", "Scene Understanding"), None, "question_type: Scene Understanding is 'None'"),
        ("seed", SEED, ("questions", 0, "data_type"), [], r"data_type is '\[\]'; expected text; it comes from"),
        ("seed", SEED, ("questions", 0, "question_type_id"), {}, "question_type_id is '{}'; expected text or a whole"),
    ],
)
def test_a_value_of_another_kind_is_named(whole, name, file, place, value, message):
    path = whole / file
    before = path.read_text()
    content = inner = json.loads(before)
    answers = predicted_answers(items := BENCHMARKS[name](whole, 0).items(), {i.id: truly(0, i) for i in items})
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    path.write_text(json.dumps(content))
    try:
        with pytest.raises(DataError, match=message) as told:
            benchmark = BENCHMARKS[name](whole, 0)
            benchmark.items()
            benchmark.score(answers)
        assert path.name in str(told.value)
    finally:
        path.write_text(before)


def test_a_claim_is_no_number_and_what_is_not_there_is_not_odd():
    assert field_problem({"count": True}, count=int) == "count is 'True'; expected a whole number"
    assert field_problem({"row": "x"}, row=str, other=int) == ""
