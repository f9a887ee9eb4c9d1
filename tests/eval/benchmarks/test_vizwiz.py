"""VizWiz: soft accuracy worked out by hand, ids of answers, submission file."""

import pytest

from tests.eval.benchmarks.written import SHORT, VICUNA, answers, humans, jsonl, plain, whole_prompt
from tests.eval.checks import has_note, refused
from vila.eval.benchmark import BENCHMARKS, Answer
from vila.eval.benchmarks.vizwiz import VizWiz

SUFFIX = f"When the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}"
# Answer, ten humans, then the value as upstream's upload is scored, and by lmms-eval.
ROWS = [
    ("Unanswerable", {"unanswerable": 10}, 1, 1, "an answer like any other, in small letters"),
    ("unanswerable.", {"unanswerable": 7, "unsuitable": 3}, 1, 1, "a full stop goes"),
    ("unsuitable", {"unanswerable": 7, "unsuitable": 3}, 0.9, 0.9, "3 humans agree"),
    ("unsuitable", {"unanswerable": 8, "unsuitable": 2}, 0.6, 0.6, "2 humans agree"),
    ("unsuitable", {"unanswerable": 9, "unsuitable": 1}, 0.3, 0.3, "1 human agrees"),
    ("yes", {"unanswerable": 10}, 0, 0, "none agrees"),
    ("Coke", {"Coke": 10}, 0, 1, "human answers are taken as they are; lmms-eval normalises them"),
    ("two", {"2": 10}, 1, 1, "number words become digits"),
    ("two", {"two": 10}, 0, 1, "but not those of humans"),
    ("5 dollar bill", {"5 dollar bill": 10}, 1, 1, "equal"),
    ("the 5 dollar bill", {"5 dollar bill": 10}, 1, 1, "articles go"),
    ("joe's", {"joe's": 10}, 0, 1, "'s is parted in the upload"),
    ("", {"unanswerable": 10}, 0, 0, "an empty answer is not unanswerable"),
    ("white\nshirt", {"white shirt": 4, "shirt": 6}, 1, 1, "a line break is a space"),
    ("white, shirt", {"white shirt": 10}, 1, 1, "commas go"),
    ("hello,world", {"hello world": 10}, 0, 0, "also where no space follows"),
    ("12:30", {"12:30": 10}, 1, 1, "colons stay"),
    ("$10", {"10": 10}, 0, 0, "currency signs stay"),
    ("\u00fcber", {"\u00fcber": 2, "bar": 8}, 0.6, 0.6, "letters of other alphabets stay"),
    ("don't know", {"dont know": 10}, 0, 1, "contractions of humans stay"),
    ("yes!", {"yes": 10}, 1, 1, "marks go"),
    ("YES", {"yes": 4, "no": 6}, 1, 1, "4 humans agree"),
]
POINTS = 12.4  # 10 rows give 1, one 0.9, two 0.6, one 0.3, eight 0


def image_name(number: int, split: str = "val") -> str:
    return f"VizWiz_{split}_{number:08d}.jpg"


TEXTS = {image_name(number): row[0] for number, row in enumerate(ROWS)}


@pytest.fixture
def folder(tmp_path):
    rows = [
        {
            "image": image_name(n),
            "question": f"What is {n}?",
            "answers": humans(row[1]),
            "answer_type": "other",
            "answerable": 1,
        }
        for n, row in enumerate(ROWS)
    ]
    plain(tmp_path / "vizwiz" / "val.json", rows)
    return tmp_path


@pytest.fixture
def asked(tmp_path):
    rows = [
        {"question_id": n, "image": image_name(n, "test"), "text": f"What Is {n}?\n{SUFFIX}", "category": "default"}
        for n in range(3)
    ]
    return jsonl(tmp_path / "asked" / "llava_test.jsonl", rows).parent


def test_score_of_each_example(folder):
    result = VizWiz(folder).score(answers(TEXTS))
    assert [mark.value for mark in result.question_scores] == pytest.approx([row[2] for row in ROWS])
    assert result.score == pytest.approx(100 * POINTS / 22)
    assert result.metrics == {"questions": 22, "by_answer_type": {"other": result.score}}


def test_numbers_are_those_of_the_validation_split_if_every_record_repeats_its_question(folder, asked):
    (asked / "llava_test.jsonl").rename(folder / "vizwiz" / "llava_test.jsonl")
    numbered = {number: row[0] for number, row in enumerate(ROWS)}
    prompts = {number: f"What is {number}?\n{SUFFIX}" for number in numbered}
    assert VizWiz(folder).score(answers(numbered, prompts)).score == pytest.approx(100 * POINTS / 22)
    with refused("22 answers", field="vizwiz"):
        VizWiz(folder).score(answers(numbered, {**prompts, 3: "Who is this?"}))
    with refused("22 answers", field="vizwiz"):
        VizWiz(folder).score(answers(numbered))


def test_lmms_eval_normalises_humans_too(folder):
    result = VizWiz(folder / "vizwiz").score(answers(TEXTS), "lmms-eval")
    assert [mark.value for mark in result.question_scores] == pytest.approx([row[3] for row in ROWS])


@pytest.mark.parametrize(
    "named", [lambda n: image_name(n), lambda n: image_name(n)[:-4], lambda n: f"val/{image_name(n)}", int, str]
)
def test_answers_name_their_image_or_have_its_number(folder, named):
    rows = [Answer(named(number), row[0], f"What is {number}?\n{SUFFIX}") for number, row in enumerate(ROWS)]
    assert VizWiz(folder).score(rows[::-1]).score == pytest.approx(100 * POINTS / 22)


def test_question_files_name_the_image_of_an_id(folder):
    rows = [
        {"question_id": 100 + n, "image": image_name(n), "text": f"What is {n}?\n{SUFFIX}"} for n in range(len(ROWS))
    ]
    jsonl(folder / "vizwiz" / "llava_test.jsonl", rows)
    given = [Answer(100 + number, row[0]) for number, row in enumerate(ROWS)]
    assert VizWiz(folder).score(given).score == pytest.approx(100 * POINTS / 22)


def test_answers_to_the_test_split_are_for_the_server(folder, asked):
    (asked / "llava_test.jsonl").rename(folder / "vizwiz" / "llava_test.jsonl")
    with refused("22 answers", "vila submit", "2185", field="vizwiz"):
        VizWiz(folder).score([Answer(number, "x") for number in range(22)])
    (folder / "vizwiz" / "val.json").unlink()
    with refused("val.json", "vila submit", field="vizwiz"):
        VizWiz(folder).score([Answer(1, "x")])


def test_numbers_of_another_benchmark_are_refused(folder):
    with refused("VizWiz_val_00000000.jpg", "'Is there a dog", field="vizwiz"):
        VizWiz(folder).score([Answer(number, "yes", f"Is there a dog?\n{SHORT}") for number in range(22)])


def test_missing_answers_are_refused_and_others_noted(folder):
    rows = answers(TEXTS)
    with refused("1 questions", "VizWiz_val_00000003.jpg", field="vizwiz"):
        VizWiz(folder).score([*rows[:3], *rows[4:]])
    result = VizWiz(folder).score([*rows, Answer(image_name(5), "unanswerable"), Answer(image_name(50), "x")])
    assert result.score == pytest.approx(100 * (POINTS + 1) / 22)
    assert [note.split(":")[1] for note in result.notes] == [f" {image_name(5)}", f" {image_name(50)}"]


def test_the_upload_has_every_image_in_order(asked):
    rows = [Answer(2, "The Cat."), Answer(0, "x"), Answer("1", "Unanswerable"), Answer(0, "joe's"), Answer(9, "x")]
    submission = VizWiz(asked).submission(rows)
    assert submission.rows == [
        {"image": "VizWiz_test_00000000.jpg", "answer": "joe 's"},
        {"image": "VizWiz_test_00000001.jpg", "answer": "unanswerable"},
        {"image": "VizWiz_test_00000002.jpg", "answer": "cat"},
    ]
    assert (submission.format, "2185" in submission.server) == ("json", True)
    for check, mentions in zip(submission.checks, [("3 images",), ("1", ": 0"), ("1", ": 9")], strict=True):
        assert has_note([check], *mentions)
    with refused("2 questions", "1, 2", field="vizwiz"):
        VizWiz(asked).submission(rows[1:2])


def test_the_whole_prompts_of_both_splits(folder, asked):
    item = BENCHMARKS["vizwiz"](asked, 0).items()[0]
    assert whole_prompt(item) == (
        f"{VICUNA}What Is 0?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase. ASSISTANT:"
    )
    assert item.messages[0].parts[0].source == asked / "test" / "VizWiz_test_00000000.jpg"
    item = VizWiz(folder, 1).items()[-1]
    assert whole_prompt(item) == f"{VICUNA}What is 0?\n{SUFFIX} ASSISTANT:"
    assert (item.id, item.truth, item.category) == (image_name(0), "unanswerable", "other")
    assert VizWiz(folder, 1).score([Answer(item.id, "Unanswerable")]).score == 100


@pytest.mark.parametrize(
    ("rows", "record", "field"),
    [
        ({}, None, None),
        ([{"image": "a.jpg", "question": "?"}], "row 1", "answers"),
        ([{"image": "a.jpg", "question": "?", "answers": [{"text": "x"}]}], "row 1", "answers"),
    ],
)
def test_annotations_that_lack_something_are_refused(tmp_path, rows, record, field):
    plain(tmp_path / "val.json", rows)
    with refused(file="val.json", record=record, field=field):
        VizWiz(tmp_path).score([Answer("a.jpg", "x")])


def test_missing_files_are_named(tmp_path, folder):
    with refused("llava_test.jsonl", "eval.zip", field="vizwiz"):
        VizWiz(tmp_path / "nothing")
    with refused("llava_test.jsonl", field="vizwiz"):
        VizWiz(folder).submission([Answer(0, "x")])
