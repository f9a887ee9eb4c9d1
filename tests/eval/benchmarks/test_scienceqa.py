"""ScienceQA: accuracies worked out by hand for three parsers, prompts, damaged files."""

import pytest

from tests.eval.benchmarks.written import VICUNA, jsonl, plain, whole_prompt
from tests.eval.checks import has_note, refused
from vila.eval.benchmark import BENCHMARKS, Answer
from vila.eval.benchmarks.scienceqa import ScienceQa
from vila.eval.predictions import read_answers

LETTER = "Answer with the option's letter from the given choices directly."
# Answer, number of choices, true letter, then right by VILA's, LLaVA's and lmms-eval's reading.
ROWS = [
    ("B", 4, "B", 1, 1, 1, "the letter alone"),
    ("b", 4, "B", 0, 0, 1, "casing counts, but not for lmms-eval"),
    ("B. blue", 4, "B", 1, 1, 1, "letter, full stop, space"),
    ("B.blue", 4, "B", 1, 0, 1, "VILA needs no space"),
    ("B.", 4, "B", 1, 0, 1, "nor anything else"),
    ("B", 4, "C", 0, 0, 0, "another letter"),
    (" B", 4, "B", 0, 0, 1, "nothing is stripped, but by lmms-eval"),
    ("B\n", 4, "B", 0, 0, 1, "nor a line break"),
    ("B) blue", 4, "B", 0, 0, 0, "a bracket is no full stop"),
    ("The answer is B.", 4, "B", 1, 1, 0, "the sentence"),
    ("The answer is B", 4, "B", 0, 0, 0, "a character must follow"),
    ("The answer is B!", 4, "B", 1, 1, 0, "any character"),
    ("The answer is A. No, The answer is B.", 4, "B", 0, 0, 0, "exactly once"),
    ("the answer is B.", 4, "B", 0, 0, 0, "with a capital T"),
    ("I think so. The answer is B, blue.", 4, "B", 1, 1, 0, "anywhere"),
    ("E", 2, "B", 0, 0, 0, "a letter beyond the choices is wrong"),
    ("", 4, "A", 0, 0, 0, "nothing"),
    ("\n", 4, "A", 0, 0, 0, "nothing but white space"),
    ("D. The answer is B.", 4, "D", 1, 1, 1, "the first letter goes before the sentence"),
    ("The answer is Z.", 3, "A", 0, 0, 0, "no such choice"),
    ("\u201cB\u201d", 4, "B", 0, 0, 0, "other quotation marks are part of the answer"),
    ("choice 1", 4, "B", 0, 0, 0, "texts of choices are not read"),
    ("E. x", 5, "E", 1, 1, 1, "the fifth letter, where there are five"),
    ("F. x", 5, "A", 0, 0, 0, "letters end at E"),
    ("B.\nThe answer is C.", 4, "B", 1, 0, 1, "a line break instead of the space"),
    ("The answer is B\n.", 4, "B", 0, 0, 0, "a line break is no character of the pattern"),
]
# Rows with an image are those of even number (the 1st, 3rd, ...): 13 of them. VILA: the 1st, 3rd, 5th, 15th, 19th,
# 23rd, 25th. LLaVA: without the 5th and 25th. lmms-eval: the 1st, 3rd, 5th, 7th, 19th, 23rd, 25th.
# Of the others VILA reads the 4th, 10th and 12th, LLaVA the 10th and 12th. One question more has no answer.


def asked(number: int, choices: int) -> str:
    options = "\n".join(f"{'ABCDE'[k]}. choice {k}" for k in range(choices))
    return f"Context: Number {number}.\nWhich is right?\n{options}"


def row_of(number: int) -> dict:
    text, choices = ROWS[number][:2]
    placeholder = "" if number % 2 else "<image>\n"
    return {"question_id": str(number), "prompt": f"{placeholder}{asked(number, choices)}\n{LETTER}", "text": text}


@pytest.fixture
def folder(tmp_path):
    problems = {
        str(n): {
            "question": "Which is right?",
            "choices": [f"choice {k}" for k in range(row[1])],
            "answer": "ABCDE".index(row[2]),
            "image": None if n % 2 else "image.png",
            "subject": "natural science" if n < 4 else "social science",
        }
        for n, row in enumerate(ROWS)
    }
    problems["missing"] = {"question": "?", "choices": ["a", "b"], "answer": 0, "image": "image.png"}
    problems["training"] = {"question": "?", "choices": ["a", "b"], "answer": 0}
    plain(tmp_path / "scienceqa" / "problems.json", problems)
    plain(tmp_path / "scienceqa" / "pid_splits.json", {"test": [*map(str, range(len(ROWS))), "missing"]})
    return tmp_path


@pytest.fixture
def rows():
    return [row_of(n) for n in range(len(ROWS))]


def answers(rows) -> list[Answer]:
    return [Answer(row["question_id"], row["text"], row.get("prompt", "")) for row in rows]


def test_the_published_figure_is_vilas_over_questions_with_an_image(folder, rows):
    result = BENCHMARKS["scienceqa"](folder, 0).score(answers(rows))
    assert result.score == pytest.approx(100 * 7 / 13)
    assert result.metrics["image_accuracy"] == result.score
    assert result.metrics["accuracy"] == pytest.approx(100 * 10 / 27)
    assert result.metrics["llava_image_accuracy"] == pytest.approx(100 * 5 / 13)
    assert result.metrics["llava_accuracy"] == pytest.approx(100 * 7 / 27)
    assert result.metrics["by_subject"] == pytest.approx({"natural science": 100, "social science": 100 * 5 / 11})
    assert (result.metrics["questions"], result.metrics["image_questions"]) == (27, 13)


def test_lmms_eval_reads_otherwise(folder, rows):
    result = ScienceQa(folder).score(answers(rows), "lmms-eval")
    # 13 answered questions with an image, and the one without an answer, which has an image too.
    assert result.score == pytest.approx(100 * 7 / 14)
    assert [mark.id for mark in result.question_scores if mark.value] == ["0", "2", "4", "6", "18", "22", "24"]


@pytest.mark.parametrize(("place", "name"), [(3, "upstream"), (5, "lmms-eval")])
def test_score_of_each_example(folder, rows, place, name):
    for row in rows:
        row["prompt"] = "<image>\n" + row["prompt"].removeprefix("<image>\n")
    question_scores = {mark.id: mark for mark in ScienceQa(folder).score(answers(rows), name).question_scores}
    wrong = [row[-1] for n, row in enumerate(ROWS) if question_scores[str(n)].value != row[place]]
    assert wrong == []
    assert question_scores["15"].rule == "the letter alone, but option E does not exist" or name == "lmms-eval"


def test_a_question_without_an_answer_is_wrong_but_has_no_image(folder, rows):
    result = ScienceQa(folder).score(answers(rows))
    assert has_note(result.notes, "1 questions without an answer", ": missing")
    assert result.metrics["image_questions"] == 13  # although its problem has one


def test_lmms_eval_counts_image_questions_without_an_answer(folder, rows):
    whole = ScienceQa(folder).score(answers(rows), "lmms-eval")
    assert whole.metrics["image_questions"] == 14
    for given in (rows[1:], [{**rows[0], "text": ""}, *rows[1:]]):  # absent, or empty: the first is right otherwise
        result = ScienceQa(folder).score(answers(given), "lmms-eval")
        assert result.score == pytest.approx(100 * 6 / 14)
        assert [mark.value for mark in result.question_scores if mark.id in ("0", "missing")] == [0, 0]
    # Upstream takes an absent answer for one to a question without an image, an empty one for wrong.
    assert ScienceQa(folder).score(answers(rows[1:])).score == pytest.approx(100 * 6 / 12)
    assert ScienceQa(folder).score(answers([{**rows[0], "text": ""}, *rows[1:]])).score == pytest.approx(100 * 6 / 13)


def test_order_does_not_matter_and_the_last_answer_counts(folder, rows):
    before = ScienceQa(folder).score(answers(rows)).score
    again = [{**rows[0], "text": "A"}, *reversed(rows)]
    result = ScienceQa(folder).score(answers(again))
    assert result.score == before
    assert has_note(result.notes, "several answers", ": 0")


def test_answers_to_other_splits_are_left_out_with_a_note(folder, rows):
    result = ScienceQa(folder).score(answers([*rows, {"question_id": "training", "text": "A"}]))
    assert result.metrics["questions"] == 27
    assert has_note(result.notes, "unknown", ": training")


def test_numbers_for_ids_are_not_found_as_in_upstream(folder, rows):
    rows[0]["question_id"] = 0
    result = ScienceQa(folder).score(answers(rows))
    assert result.score == pytest.approx(100 * 6 / 12)
    assert has_note(result.notes, "question_id", "expected text", ": 0")
    with refused("question_id", "all 26", field="scienceqa"):
        ScienceQa(folder).score([Answer(n, "A") for n in range(26)])


def test_answers_of_another_benchmark_are_refused_or_noted(folder, rows):
    with refused("v1", field="scienceqa"):
        ScienceQa(folder).score([Answer("v1", "A")])
    rows = [{**row, "prompt": "<image>\nWhat colour?"} for row in rows]
    result = ScienceQa(folder).score(answers(rows))
    assert has_note(result.notes, "prompts")


def test_rows_without_a_prompt_take_the_image_from_the_problems(folder, rows):
    for row in rows:
        del row["prompt"]
    result = ScienceQa(folder).score(answers(rows))
    assert result.metrics["image_questions"] == 13
    assert has_note(result.notes, "26 answers", "no prompt", "question: 0")


def test_without_questions_about_images_the_figure_is_zero_and_noted(folder, rows):
    result = ScienceQa(folder).score(answers(rows[1:2]))
    assert result.score == 0
    assert has_note(result.notes, "undefined", "0")


def test_upstream_file_and_a_truncated_one(folder, rows, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", rows)
    assert ScienceQa(folder).score(read_answers(path).answers).score == pytest.approx(100 * 7 / 13)
    path.write_text(path.read_text()[:-9])
    cut = read_answers(path)
    assert len(cut.answers) == 25
    assert [error.record for error in cut.bad] == ["line 26"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("choices", None), ("answer", "B"), ("answer", 9)],
)
def test_a_problem_without_its_fields_is_named(folder, rows, field, value):
    from vila.core.reading import read_json

    path = folder / "scienceqa" / "problems.json"
    problems = read_json(path)
    problems["3"][field] = value
    plain(path, problems)
    with refused(file="problems.json", record="question 3", field=field, value=value):
        ScienceQa(folder).score(answers(rows))


def test_another_release_of_the_problems_is_named(folder, rows):
    plain(folder / "scienceqa" / "pid_splits.json", {"test": ["0", "77777"]})
    with refused(file="problems.json", record="question 77777"):
        ScienceQa(folder).score(answers(rows))


def test_missing_files_are_named_with_their_source(tmp_path, folder):
    with refused("problems.json", "ScienceQA", field="scienceqa"):
        ScienceQa(tmp_path / "nowhere")
    with refused("llava_test_CQM-A.json", "eval.zip", field="scienceqa"):
        ScienceQa(folder).items()


@pytest.fixture
def asking(folder):
    rows = [
        {
            "id": str(n),
            "conversations": [
                {"from": "human", "value": ("" if n % 2 else "<image>\n") + asked(n, ROWS[n][1])},
                {"from": "gpt", "value": "The answer is A."},
            ],
            **({} if n % 2 else {"image": f"{n}/image.png"}),
        }
        for n in range(4)
    ]
    rows[2]["conversations"][0]["value"] = asked(2, 4) + "\n<image>"
    plain(folder / "scienceqa" / "llava_test_CQM-A.json", rows)
    return folder


def test_whole_prompts(asking):
    items = ScienceQa(asking).items()
    body = "Context: Number 0.\nWhich is right?\nA. choice 0\nB. choice 1\nC. choice 2\nD. choice 3"
    suffix = "Answer with the option's letter from the given choices directly."
    assert whole_prompt(items[0]) == f"{VICUNA}{body}\n{suffix} ASSISTANT:"
    text_only = VICUNA.removesuffix("<image>\n")
    assert whole_prompt(items[1]) == f"{text_only}{body.replace('0.', '1.', 1)}\n{suffix} ASSISTANT:"
    # The image goes in front wherever the file has it, and white space around it goes.
    assert whole_prompt(items[2]) == f"{VICUNA}{body.replace('0.', '2.', 1)}\n{suffix} ASSISTANT:"
    assert items[0].prompt == f"<image>\n{body}\n{suffix}"
    assert items[1].prompt == f"{body.replace('0.', '1.', 1)}\n{suffix}"


def test_items_have_truth_image_and_image_mode(asking):
    items = ScienceQa(asking / "scienceqa").items()
    assert [item.truth for item in items] == ["B", "B", "B", "B"]
    assert [item.question_id for item in items] == ["0", "1", "2", "3"]
    assert str(items[0].messages[0].parts[0].source).endswith("scienceqa/images/test/0/image.png")
    assert [item.image_mode for item in items[:2]] == ["square", None]
    assert len(ScienceQa(asking, limit=2).items()) == 2


def test_limited_benchmark_scores_only_its_questions(asking, rows):
    result = ScienceQa(asking, limit=3).score(answers(rows[:3]))
    assert result.metrics["questions"] == 3
    assert result.score == 100


def test_a_question_that_is_none_is_named(asking):
    plain(asking / "scienceqa" / "llava_test_CQM-A.json", [{"id": "0", "conversations": []}])
    with refused(file="llava_test_CQM-A.json", record="row 1"):
        ScienceQa(asking).items()
