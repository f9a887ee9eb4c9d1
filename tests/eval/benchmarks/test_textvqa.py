"""TextVQA: soft accuracy worked out by hand for all prompt formats, missing and repeated answers."""

import pytest

from tests.eval.benchmarks.written import SHORT, VICUNA, jsonl, plain, whole_prompt
from tests.eval.checks import refused
from vila.eval.benchmark import BENCHMARKS, Answer
from vila.eval.benchmarks.textvqa import TextVqa, question_of

ROWS = [
    ("nokia", {"nokia": 10}, 1, "equal"),
    ("Nokia.", {"nokia": 10}, 1, "small letters, no full stop"),
    ("NOKIA", {"nokia": 3, "phone": 7}, 0.9, "3 humans agree"),
    ("nokia", {"Nokia": 1, "nokia!": 1, "phone": 8}, 0.6, "2 humans agree once they are normalised"),
    ("nokia", {"nokia": 1, "phone": 9}, 0.3, "1 human agrees"),
    ("samsung", {"nokia": 10}, 0, "none agrees"),
    ("", {"the": 2, "nokia": 8}, 0.6, "an article alone is normalised to nothing"),
    ("the nokia", {"nokia": 10}, 1, "articles go"),
    ("two", {"2": 4, "3": 6}, 1, "number words become digits"),
    ("hello,world", {"hello world": 10}, 0, "words are joined at a comma"),
    ("hello world", {"hello, world": 10}, 1, "a comma beside a space goes"),
    ("joe's", {"joe's": 10}, 1, "'s is parted on both sides"),
    ("5.99.", {"5.99": 10}, 1, "a period before a digit stays"),
    ("$5", {"5": 10}, 0, "a currency sign stays"),
    ("12:30", {"12 30": 10}, 0, "a colon stays"),
    ("12-30", {"12 30": 10}, 1, "a hyphen becomes a space"),
    ("line\ntwo", {"line 2": 10}, 1, "a line break is a space"),
    ("\u00fcber", {"uber": 10}, 0, "accents stay"),
    ("dont walk", {"don't walk": 10}, 1, "contractions get their apostrophe"),
    ("Im", {"I'm": 10}, 0, "but not this one, whose entry has a capital"),
    ("none", {"0": 5, "none": 5}, 1, "none is zero"),
    ("stop!", {"stop": 4, "go": 6}, 1, "4 humans agree"),
]
POINTS = 14.4  # 12 rows give 1, one 0.9, two 0.6, one 0.3, six 0


def words(number: int) -> str:
    return f"What does sign {number} say?"


def image_id(number: int) -> str:
    return f"{number:016x}"


def prompt(number: int) -> str:
    """Records of an answer file, each in another of the published forms."""
    ask = words(number)
    return [
        f"{ask}\nReference OCR token: STOP, 5\n{SHORT}",
        f"{ask}\nReference OCR token: \n{SHORT}",
        f"Reference OCR token: STOP\n{ask.upper()}\n{SHORT}",
        f"{ask}\n{SHORT}",
        f"OCR tokens: STOP, 5. Question: {ask} Short answer:",
    ][number % 5]


def annotation(number: int, counts: dict[str, int]) -> dict:
    answers = [text for text, count in counts.items() for _ in range(count)]
    return {
        "question_id": 34602 + number,
        "image_id": image_id(number),
        "question": words(number),
        "answers": answers,
    }


def given() -> list[Answer]:
    return [Answer(image_id(n), row[0], prompt(n), f"a.jsonl line {n + 1}") for n, row in enumerate(ROWS)]


@pytest.fixture
def folder(tmp_path):
    rows = [annotation(number, row[1]) for number, row in enumerate(ROWS)]
    plain(tmp_path / "textvqa" / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": rows})
    return tmp_path


def test_score_of_each_example_for_any_prompt_format(folder):
    result = TextVqa(folder).score(given())
    assert [mark.value for mark in result.question_scores] == pytest.approx([row[2] for row in ROWS])
    assert result.score == pytest.approx(100 * POINTS / 22)
    assert (result.metrics["samples"], result.notes) == (22, ())


def test_lmms_eval_scores_the_same(folder):
    assert TextVqa(folder).score(given()[::-1], "lmms-eval").score == pytest.approx(100 * POINTS / 22)


def test_repeated_answers_count_again_and_missing_ones_do_not(folder):
    rows = [*given()[1:], given()[5], given()[5]]
    result = TextVqa(folder / "textvqa").score(rows)
    assert result.score == pytest.approx(100 * (POINTS - 1) / 23)
    assert [note.partition(" ")[0] for note in result.notes] == ["1", "1"]
    assert len({mark.id for mark in result.question_scores}) == 23
    with refused("0000000000000000/what does sign 0 say?", field="textvqa"):
        TextVqa(folder).score(rows, "lmms-eval")


@pytest.mark.parametrize(
    ("text", "question"),
    [
        (f"What Is It?\nReference OCR token: A, b\n{SHORT}", "what is it?"),
        (f"Reference OCR token: A\nWhat Is It?\n{SHORT}", "what is it?"),
        (f"What Is It?\n{SHORT}", "what is it?"),
        ("What? \nReference OCR token: ", "what? "),
        ("OCR tokens: a. Question: What\nis it? Short answer:", "what\nis it?"),
    ],
)
def test_the_question_is_parsed_from_every_form_of_the_prompt(text, question):
    assert question_of(text, "here") == question


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What is it?",
        "one\ntwo\nthree",
        "a\nReference OCR token: b\nc\nd",
        "OCR tokens: a. What is it?\nShort answer:",
    ],
)
def test_another_prompt_is_refused(folder, text):
    with refused(file="a.jsonl line 1", value=text):
        TextVqa(folder).score([Answer(image_id(0), "x", text, "a.jsonl line 1")])


def test_unknown_questions_are_refused_by_name(folder):
    with refused("'who?'", image_id(1), "TextVQA_0.5.1_val.json", file="line 9", field="textvqa"):
        TextVqa(folder).score([*given(), Answer(image_id(1), "x", f"Who?\n{SHORT}", "line 9")])
    with refused("77", field="textvqa"):
        TextVqa(folder).score([Answer(77, "x", f"{words(1)}\n{SHORT}")])
    with refused(field="textvqa"):
        TextVqa(folder).score([])


@pytest.mark.parametrize(
    ("change", "record", "field"),
    [
        (lambda row: row.pop("answers"), "row 1", "answers"),
        (lambda row: row.update(answers=[]), "row 1", "answers"),
        (lambda row: row["answers"].pop(), "question 0000000000000000/what does sign 0 say?", None),
    ],
)
def test_annotations_that_lack_something_are_refused(tmp_path, change, record, field):
    row = annotation(0, {"x": 10})
    change(row)
    plain(tmp_path / "TextVQA_0.5.1_val.json", {"data": [row]})
    with refused(file="TextVQA_0.5.1_val.json", record=record, field=field):
        TextVqa(tmp_path).score(given()[:1])


def test_the_last_of_two_annotations_of_one_question_counts(tmp_path):
    rows = [annotation(0, {"old": 10}), annotation(0, {"new": 10})]
    plain(tmp_path / "TextVQA_0.5.1_val.json", {"data": rows})
    answers = [Answer(image_id(0), "new", prompt(0)), Answer(image_id(0), "old", prompt(0))]
    result = TextVqa(tmp_path).score(answers)
    assert (result.score, result.notes) == (50, ())


def test_items_are_known_by_image_and_question(folder):
    asked = [(0, 0), (1, 1), (0, 2), (0, 0)]
    rows = [
        {
            "question_id": image_id(n),
            "image": f"{image_id(n)}.jpg",
            "text": f"{words(q)}\nReference OCR token: \n{SHORT}",
        }
        for n, q in asked
    ]
    jsonl(folder / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl", rows)
    items = BENCHMARKS["textvqa"](folder, 0).items()
    first = f"{image_id(0)}/what does sign 0 say?"
    assert [item.id for item in items[:3]] == [first, f"{image_id(0)}/what does sign 2 say?", f"{first}#2"]
    assert whole_prompt(items[0]) == f"{VICUNA}{words(0)}\nReference OCR token: \n{SHORT} ASSISTANT:"
    assert (items[0].question_id, items[0].truth, items[1].truth) == (image_id(0), "nokia", "")
    assert items[0].messages[0].parts[0].source == folder / "textvqa" / "train_images" / f"{image_id(0)}.jpg"
    assert [item.group for item in TextVqa(folder, 2).items()] == [image_id(0)] * 3
    some = TextVqa(folder, 2).score([Answer(image_id(0), "nokia", items[0].prompt)])
    assert (some.score, some.metrics["questions"]) == (100, 1)


def test_missing_files_are_named(tmp_path):
    with refused("llava_textvqa_val_v051_ocr.jsonl", "eval.zip", field="textvqa"):
        TextVqa(tmp_path)
    jsonl(
        tmp_path / "llava_textvqa_val_v051_ocr.jsonl", [{"question_id": "a", "image": "a.jpg", "text": f"Q\n{SHORT}"}]
    )
    with refused("TextVQA_0.5.1_val.json", "dl.fbaipublicfiles.com", field="textvqa"):
        TextVqa(tmp_path).score([Answer("a", "x", f"Q\n{SHORT}")])


def test_prompt_of_an_unknown_form_is_rejected_with_file_and_line(folder):
    texts = (prompt(0), "one\ntwo\nthree")
    rows = [{"question_id": image_id(n), "image": f"{image_id(n)}.jpg", "text": text} for n, text in enumerate(texts)]
    file = jsonl(folder / "llava_textvqa_val_v051_ocr.jsonl", rows)
    (folder / "train_images").mkdir(exist_ok=True)
    with refused(file=file.name, record="line 2", value="one\ntwo\nthree"):
        TextVqa(folder).items()
