"""VQAv2: soft accuracy worked out by hand, submission file, published sizes."""

import pytest

from tests.eval.benchmarks.written import SHORT, VICUNA, answers, humans, jsonl, plain, whole_prompt
from tests.eval.checks import has_note, refused
from vila.eval.benchmark import BENCHMARKS, Answer
from vila.eval.benchmarks.vqav2 import Vqav2

# What was answered, what ten humans said, then the value of: what the original uploads (normalised answers, official
# score), the same without normalising, lmms-eval.
ROWS = [
    ("yes", {"yes": 10}, 1, 1, 1, "equal"),
    ("Yes", {"yes": 10}, 1, 0, 1, "uploads are in small letters; unanimous answers are compared as they are"),
    ("yes.", {"yes": 10}, 1, 0, 1, "uploads have no full stop"),
    ("Yes", {"yes": 9, "no": 1}, 1, 1, 1, "not unanimous: both sides are normalised"),
    ("two", {"2": 10}, 1, 0, 1, "number words become digits"),
    ("the dog", {"dog": 3, "cat": 7}, 0.9, 0.9, 0.9, "3 humans agree; articles go"),
    ("dog", {"dog": 2, "cat": 8}, 0.6, 0.6, 0.6, "2 humans agree"),
    ("dog", {"dog": 1, "cat": 9}, 0.3, 0.3, 0.3, "1 human agrees"),
    ("bird", {"dog": 1, "cat": 9}, 0, 0, 0, "none agrees"),
    ("", {"yes": 10}, 0, 0, 0, "an empty answer is an answer"),
    ("girl's", {"girl's": 10}, 0, 1, 1, "uploads part 's, unanimous answers do not"),
    ("girl's", {"girl's": 9, "girl": 1}, 0, 1, 1, "nor does the official normaliser"),
    ("hello,world", {"hello world": 9, "hi": 1}, 0, 1, 1, "uploads join words at a comma"),
    ("1,000", {"1000": 5, "1,000": 5}, 1, 1, 1, "both human spellings become one"),
    ("red\nblue", {"red blue": 10}, 1, 1, 1, "a line break is a space"),
    (" yes ", {"yes": 10}, 1, 1, 1, "spaces at the ends go on all sides"),
    ("none", {"0": 4, "none": 6}, 1, 1, 1, "none is zero"),
    ("don't", {"dont": 8, "no": 2}, 1, 1, 1, "contractions of humans get their apostrophe"),
    ("yes, it is", {"yes": 10}, 0, 0, 0, "more words are another answer"),
    ("YES", {"Yes": 10}, 0, 0, 1, "capitals of unanimous humans stay"),
    ("yes?", {"yes": 4, "yes ?": 6}, 1, 1, 1, "question marks go"),
    ("\u00fcber", {"\u00fcber": 3, "bar": 7}, 0.9, 0.9, 0.9, "letters of other alphabets stay"),
]
IDS = [262148000 + number for number in range(len(ROWS))]
TEXTS = {key: row[0] for key, row in zip(IDS, ROWS, strict=True)}


def annotation(key, counts):
    rows = [{**row, "answer_id": number} for number, row in enumerate(humans(counts), 1)]
    return {
        "question_id": key,
        "image_id": key // 1000,
        "question_type": "what is" if key % 2 else "is the",
        "answer_type": "other",
        "multiple_choice_answer": max(counts, key=counts.get),
        "answers": rows,
    }


@pytest.fixture
def folder(tmp_path):
    rows = [annotation(key, row[1]) for key, row in zip(IDS, ROWS, strict=True)]
    head = {"info": {"year": 2017}, "data_type": "mscoco"}
    plain(tmp_path / "vqav2" / "v2_mscoco_val2014_annotations.json", {**head, "annotations": rows})
    return tmp_path


@pytest.fixture
def asked(tmp_path):
    """Test-dev and test2015 question files, without images."""
    folder = tmp_path / "asked" / "vqav2"
    rows = [
        {
            "question_id": key,
            "image": f"COCO_test2015_{key // 10:012d}.jpg",
            "text": f"What {key}?\n{SHORT}",
            "category": "default",
        }
        for key in (11, 12, 21, 31, 32)
    ]
    jsonl(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", rows[:3])
    jsonl(folder / "llava_vqav2_mscoco_test2015.jsonl", rows)
    return folder


def test_score_of_each_example(folder):
    result = Vqav2(folder).score(answers(TEXTS))
    assert {mark.id: mark.value for mark in result.question_scores} == pytest.approx(
        {str(key): row[2] for key, row in zip(IDS, ROWS, strict=True)}
    )
    # 11 rows give 1, two 0.9, one 0.6, one 0.3, seven 0.
    assert result.score == pytest.approx(100 * 13.7 / 22)
    assert result.metrics["not_normalised"] == pytest.approx(100 * sum(row[3] for row in ROWS) / 22)
    assert result.metrics["by_answer_type"] == {"other": result.score}
    even = [row[2] for key, row in zip(IDS, ROWS, strict=True) if key % 2 == 0]
    assert result.metrics["by_question_type"]["is the"] == pytest.approx(100 * sum(even) / 11)
    assert result.notes == ()


def test_lmms_eval_normalises_both_sides_always(folder):
    result = Vqav2(folder).score(answers(TEXTS), "lmms-eval")
    assert [mark.value for mark in result.question_scores] == pytest.approx([row[4] for row in ROWS])


def test_the_order_of_rows_and_the_type_of_ids_do_not_matter(folder):
    rows = [Answer(str(answer.question_id), answer.text) for answer in reversed(answers(TEXTS))]
    assert Vqav2(folder / "vqav2").score(rows).score == pytest.approx(100 * 13.7 / 22)


def test_missing_repeated_and_unknown_answers_are_scored_as_upstream_does(folder):
    rows = [*answers(TEXTS)[1:], Answer(IDS[1], "no"), Answer(7, "yes")]
    result = Vqav2(folder).score(rows)
    assert result.score == pytest.approx(100 * 11.7 / 22)  # without the first two answers' points
    assert [note.split(": ")[1] for note in result.notes] == [str(IDS[0]), str(IDS[1]), "7"]
    with refused(str(IDS[0]), field="vqav2"):
        Vqav2(folder).score(rows, "lmms-eval")


def test_answers_to_the_test_split_are_for_the_server(folder, asked):
    with refused("vila submit", "830", field="vqav2"):
        Vqav2(folder).score([Answer(11, "yes")])
    with refused("v2_mscoco_val2014_annotations.json", "vila submit", field="vqav2"):
        Vqav2(asked).score([Answer(11, "yes")])


def test_the_whole_prompt(asked):
    items = Vqav2(asked.parent).items()
    assert whole_prompt(items[0]) == f"{VICUNA}What 11?\n{SHORT} ASSISTANT:"
    assert (items[0].prompt, items[0].question_id, items[0].id) == (f"What 11?\n{SHORT}", 11, "11")
    assert items[0].messages[0].parts[0].source == asked / "test2015" / "COCO_test2015_000000000001.jpg"


def test_validation_questions_without_test_dev(folder):
    home = folder / "vqav2"
    rows = [{"question_id": key, "image_id": key // 1000, "question": "Is it?"} for key in IDS]
    plain(home / "v2_OpenEnded_mscoco_val2014_questions.json", {"info": {}, "questions": rows})
    benchmark = BENCHMARKS["vqav2"](folder, 3)
    assert whole_prompt(benchmark.items()[0]) == f"{VICUNA}Is it?\n{SHORT} ASSISTANT:"
    assert benchmark.items()[0].messages[0].parts[0].source == home / "val2014" / "COCO_val2014_000000262148.jpg"
    others = [Answer(key, "no", "Is this a photo?\nAnswer yes or no.") for key in IDS]
    with refused("Is this a photo?", field="vqav2"):
        Vqav2(folder).score(others)


def test_limit_takes_whole_images(asked):
    assert [item.id for item in Vqav2(asked, 1).items()] == ["11", "12"]


def test_the_upload_has_every_question_of_test2015_in_order(asked):
    rows = [Answer(31, "A Cat."), Answer(11, "Yes"), Answer(11, "No, never"), Answer("12", "girl's"), Answer(5, "x")]
    submission = Vqav2(asked).submission(rows)
    assert submission.rows == [
        {"question_id": 11, "answer": "no never"},
        {"question_id": 12, "answer": "girl 's"},
        {"question_id": 21, "answer": ""},
        {"question_id": 31, "answer": "cat"},
        {"question_id": 32, "answer": ""},
    ]
    assert (submission.format, "830" in submission.server) == ("json", True)
    for check, mentions in zip(
        submission.checks, [("5", "3", "2"), ("3", "1", "21"), ("1", "11"), ("1", "5")], strict=True
    ):
        assert has_note([check], *mentions)
    with refused("5", "11, 12, 21", field="vqav2"):
        Vqav2(asked).submission([Answer(5, "x")])


def test_missing_files_are_named_with_where_it_comes_from(tmp_path, asked):
    with refused("llava_vqav2_mscoco_test-dev2015.jsonl", "eval.zip", field="vqav2"):
        Vqav2(tmp_path)
    (asked / "llava_vqav2_mscoco_test2015.jsonl").unlink()
    with refused("llava_vqav2_mscoco_test2015.jsonl", field="vqav2"):
        Vqav2(asked).submission([Answer(11, "yes")])


@pytest.mark.parametrize(
    ("change", "record", "field"),
    [
        (lambda row: row.pop("answer_type"), "question 262148000", "answer_type"),
        (lambda row: row.update(answers=[]), "question 262148000", "answers"),
        (lambda row: row["answers"][3].update(answer=None), "question 262148000", "answers"),
        (lambda row: row.pop("question_id"), "question None", "question_id"),
    ],
)
def test_annotations_that_lack_something_are_refused(tmp_path, change, record, field):
    row = annotation(IDS[0], {"yes": 10})
    change(row)
    plain(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": [row]})
    with refused(file="v2_mscoco_val2014_annotations.json", record=record, field=field):
        Vqav2(tmp_path).score([Answer(IDS[0], "yes")])


@pytest.mark.parametrize(
    ("text", "mention"),
    [
        ('{"questions": []}', "annotations"),
        ('{"annotations": [{"question_id": 1, "ques', "character 17"),
        ("[]", "'annotations'"),
        ('{"annotations": {"question_id": 1}}', "'annotations'"),
    ],
)
def test_annotation_files_of_another_shape_or_truncated_are_refused(tmp_path, text, mention):
    (tmp_path / "v2_mscoco_val2014_annotations.json").write_text(text)
    with refused(mention, file="v2_mscoco_val2014_annotations.json"):
        Vqav2(tmp_path).score([Answer(1, "yes")])


def test_question_files_truncated_or_without_a_field_are_refused(asked):
    path = asked / "llava_vqav2_mscoco_test-dev2015.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-20])
    with refused(file=path.name, record="line 3"):
        Vqav2(asked).items()
    path.write_text(whole.replace('"image"', '"picture"'))
    with refused(file=path.name, record="line 1", field="image"):
        Vqav2(asked).items()
    path.write_text(whole + whole)
    with refused(file=path.name, record="line 4", field="question_id", value=11):
        Vqav2(asked).items()


@pytest.mark.slow
def test_published_sizes(tmp_path):
    ids = range(1000, 1000 + 447_793)
    jsonl(
        tmp_path / "llava_vqav2_mscoco_test2015.jsonl",
        ({"question_id": key, "image": "COCO_test2015_000000000001.jpg", "text": f"What?\n{SHORT}"} for key in ids),
    )
    given = [Answer(key, f"A {key % 3000} cats.") for key in ids[:107_394]]
    submission = Vqav2(tmp_path).submission(given)
    assert len(submission.rows) == 447_793
    assert submission.rows[107_393]["answer"] == f"{ids[107_393] % 3000} cats"
    assert has_note(submission.checks, "447793", "107394", "340399")
    rows = [annotation(key, {f"{key % 3000} cats": 4, "cat": 6}) for key in ids[:107_394]]
    plain(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": rows})
    assert Vqav2(tmp_path).score(given).score == 100
