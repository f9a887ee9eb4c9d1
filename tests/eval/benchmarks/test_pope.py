"""POPE: metrics worked out by hand, matching by question, label files of other releases."""

import random

import pytest

from tests.eval.benchmarks.written import SHORT, VICUNA, answers, jsonl, whole_prompt
from tests.eval.checks import has_note, refused
from vila.eval.benchmark import BENCHMARKS, Answer
from vila.eval.benchmarks.pope import Pope

# Answer, label, whether the original reads yes, whether lmms-eval calls it right.
ROWS = {
    "adversarial": [
        ("Yes", "yes", True, True, "no word No, no or not"),
        ("no", "no", False, True, "the word no"),
        ("NO", "no", True, True, "NO is none of the three words; lmms-eval makes letters small"),
        ("Nope", "no", True, False, "nor is Nope"),
        ("No!", "no", True, False, "nor is No with a mark"),
        ("Not sure", "no", True, False, "nor is Not"),
        ("", "yes", True, False, "nothing is yes"),
        ("no", "yes", False, False, "wrong"),
    ],
    "popular": [
        ("yes, no doubt", "yes", False, False, "commas go, then the word no is there"),
        ("No, there is not.", "no", False, False, "the word No"),
        ("Yes. There is no cat", "yes", True, False, "only the first sentence counts"),
        ("There is no cat.", "no", False, False, "no anywhere in it"),
        ("no\n", "no", True, True, "a line break is not a space; lmms-eval strips it"),
        ("I do not know", "yes", False, False, "the word not"),
        ("yes", "yes", True, True, "yes"),
        ("yes", "no", True, False, "wrong"),
    ],
    "random": [
        ("yes", "yes", True, True, "yes"),
        ("Yes", "yes", True, True, "yes"),
        ("YES", "yes", True, True, "yes"),
        ("no.", "no", False, False, "before the full stop; lmms-eval keeps it"),
        ("No", "no", False, True, "the word No"),
        ("nothing", "no", True, False, "no is only the beginning of a word"),
        (".no", "no", True, False, "nothing stands before the first full stop"),
        ("No", "yes", False, False, "wrong"),
    ],
}
FIRST = {"adversarial": 1, "random": 10000001, "popular": 20000001}
THINGS = ["dog", "cat", "car", "tree", "cup", "boat", "chair", "person"]


def image_name(number: int) -> str:
    return f"COCO_val2014_{number // 4:012d}.jpg"


def question(category: str, number: int) -> dict:
    return {
        "question_id": FIRST[category] + number,
        "image": image_name(number),
        "text": f"Is there a {THINGS[number]} in the image?\n{SHORT}",
        "category": category,
    }


@pytest.fixture
def folder(tmp_path):
    jsonl(tmp_path / "pope" / "llava_pope_test.jsonl", [question(name, n) for name in ROWS for n in range(8)])
    for name, rows in ROWS.items():
        labels = [
            {
                "question_id": n + 1,
                "image": image_name(n),
                "text": f"Is there a {THINGS[n]} in the image?",
                "label": row[1],
            }
            for n, row in enumerate(rows)
        ]
        jsonl(tmp_path / "pope" / "coco" / f"coco_pope_{name}.json", labels)
    return tmp_path


def given() -> list[Answer]:
    return answers({FIRST[name] + n: row[0] for name, rows in ROWS.items() for n, row in enumerate(rows)})


def test_parsing_of_each_example(folder):
    result = Pope(folder).score(given())
    expected = [answer == (label == "yes") for rows in ROWS.values() for _, label, answer, _, _ in rows]
    assert [mark.value for mark in result.question_scores] == expected
    assert [mark.rule == "parsed as yes" for mark in result.question_scores] == [
        row[2] for rows in ROWS.values() for row in rows
    ]


def test_the_headline_is_the_mean_of_three_f1(folder):
    result = Pope(folder).score(given())
    adversarial, popular, other = (result.metrics["by_category"][name] for name in ROWS)
    assert adversarial == pytest.approx(
        {
            "tp": 2,
            "fp": 4,
            "tn": 1,
            "fn": 1,
            "accuracy": 3 / 8,
            "precision": 1 / 3,
            "recall": 2 / 3,
            "f1": 4 / 9,
            "yes_ratio": 6 / 8,
        }
    )
    assert (popular["f1"], popular["accuracy"], popular["yes_ratio"]) == (0.5, 0.5, 0.5)
    assert other == pytest.approx(
        {
            "tp": 3,
            "fp": 2,
            "tn": 2,
            "fn": 1,
            "accuracy": 5 / 8,
            "precision": 3 / 5,
            "recall": 3 / 4,
            "f1": 2 / 3,
            "yes_ratio": 5 / 8,
        }
    )
    assert result.score == pytest.approx(100 * (4 / 9 + 1 / 2 + 2 / 3) / 3)
    assert (result.unit, result.notes) == ("%", ())
    assert [result.metrics["pooled"][key] for key in ("tp", "fp", "tn", "fn")] == [7, 8, 5, 4]


def test_lmms_eval_pools_and_reads_whole_answers(folder):
    result = Pope(folder).score(given(), "lmms-eval")
    assert [mark.value for mark in result.question_scores] == [row[3] for rows in ROWS.values() for row in rows]
    # yes and true: 5; yes and false: 1; no and true: 2; other answers are no part of them.
    assert result.score == pytest.approx(100 * 10 / 13)
    assert result.metrics["precision"] == pytest.approx(5 / 6)
    assert result.metrics["recall"] == pytest.approx(5 / 7)
    assert result.metrics["accuracy"] == pytest.approx(9 / 24)
    assert result.metrics["yes_ratio"] == pytest.approx(11 / 24)  # of the labels


def test_lmms_eval_counts_a_question_without_an_answer_as_wrong(folder):
    rows = given()
    result = Pope(folder).score(rows[1:], "lmms-eval")  # the first is right: yes to yes
    assert (result.metrics["questions"], result.metrics["missing"]) == (24, 1)
    assert result.metrics["accuracy"] == pytest.approx(8 / 24)
    assert result.metrics["recall"] == pytest.approx(4 / 6)  # an answer that is neither yes nor no is no part of it
    assert (result.question_scores[0].value, result.question_scores[0].rule) == (0, "no answer")
    empty = [Answer(rows[0].question_id, "", rows[0].prompt), *rows[1:]]
    assert Pope(folder).score(empty, "lmms-eval").score == result.score
    assert Pope(folder).score(rows[1:]).metrics["questions"] == 23


def test_shuffled_answers_score_the_same_and_it_is_reported(folder):
    rows = given()
    random.Random(0).shuffle(rows)
    result = Pope(folder / "pope").score(rows)
    assert result.score == Pope(folder).score(given()).score
    assert len(result.notes) == 1
    assert "order" in result.notes[0]


def test_missing_answers_do_not_count_and_are_named(folder):
    rows = [row for row in given() if row.question_id != FIRST["random"] + 7]
    result = Pope(folder).score(rows)
    assert result.metrics["by_category"]["random"]["f1"] == pytest.approx(2 * 0.6 / 1.6)  # precision 3/5, recall 1
    assert has_note(result.notes[:1], "1 questions", ": 10000008")
    assert len(result.notes) == 1  # the last of its file: none after it moved up
    assert len(Pope(folder).score(given()[1:]).notes) == 2


def test_a_category_without_answers_is_reported(folder):
    result = Pope(folder).score(given()[:16])
    assert result.score == pytest.approx(100 * (4 / 9 + 1 / 2) / 2)
    assert has_note(result.notes, "category random")


def test_the_last_of_several_answers_counts(folder):
    result = Pope(folder).score([*given(), Answer(8, "Yes")])
    assert result.metrics["by_category"]["adversarial"]["tp"] == 3
    assert has_note(result.notes[:1], "1 questions", ": 8")


def test_answers_without_yes_score_zero_with_a_note(folder):
    result = Pope(folder).score([Answer(row.question_id, "no") for row in given()])
    assert result.score == 0
    assert has_note(result.notes[:1], "adversarial: ", "F1")


def test_answers_of_another_benchmark_are_refused(folder):
    with refused("1 answers", "llava_pope_test.jsonl", ": 9", field="pope"):
        Pope(folder).score([*given(), Answer(9, "yes")])
    vizwiz = [Answer(number, "yes", f"What is this?\n{SHORT}", f"v.jsonl line {number}") for number in range(1, 9)]
    with refused("question_id 1", "'What is this?", "'Is there a dog", file="v.jsonl line 1", field="pope"):
        Pope(folder).score(vizwiz)


def test_label_files_of_another_release_are_refused(folder):
    path = folder / "pope" / "coco" / "coco_pope_random.json"
    whole = path.read_text()
    more = whole + whole.splitlines()[0] + "\n"
    path.write_text(more)
    with refused("9 labels", "8 random questions", "e3e3926", file=path.name):
        Pope(folder).score(given())
    path.write_text(whole.replace("a dog", "a horse"))
    with refused("'Is there a dog in the image", file=path.name, record="question 10000001"):
        Pope(folder).score(given())
    path.write_text(whole.replace('"label"', '"answer"'))
    with refused(file=path.name, record="line 1", field="label"):
        Pope(folder).score(given())
    path.write_text(whole[:-10])
    with refused(file=path.name, record="line 8"):
        Pope(folder).score(given())
    path.unlink()
    with refused("coco_pope_random.json", "e3e3926", field="pope"):
        Pope(folder).score(given())


def test_a_question_asked_twice_about_an_image_keeps_its_label(tmp_path):
    jsonl(tmp_path / "llava_pope_test.jsonl", [question("random", 0), {**question("random", 0), "question_id": 5}])
    label = {"image": image_name(0), "text": "Is there a dog in the image?"}
    jsonl(tmp_path / "coco" / "coco_pope_random.json", [{**label, "label": "yes"}, {**label, "label": "no"}])
    assert [item.truth for item in Pope(tmp_path).items()] == ["yes", "no"]


def test_the_whole_prompt_and_images_together(folder):
    items = BENCHMARKS["pope"](folder, 0).items()
    assert whole_prompt(items[0]) == f"{VICUNA}Is there a dog in the image?\n{SHORT} ASSISTANT:"
    assert [item.group for item in items] == [image_name(0)] * 12 + [image_name(4)] * 12
    assert (items[0].question_id, items[0].category, items[0].truth) == (1, "adversarial", "yes")
    assert items[0].messages[0].parts[0].source == folder / "pope" / "val2014" / image_name(0)


def test_a_few_images_are_scored_alone(folder):
    benchmark = Pope(folder, 5)
    kept = {item.question_id for item in benchmark.items()}
    result = benchmark.score([row for row in given() if row.question_id in kept])
    assert (result.metrics["questions"], result.notes) == (12, ())


def test_questions_are_asked_without_labels(tmp_path):
    jsonl(tmp_path / "llava_pope_test.jsonl", [question("random", 0)])
    assert [item.truth for item in Pope(tmp_path).items()] == [""]
    with refused("llava_pope_test.jsonl", field="pope"):
        Pope(tmp_path / "pope")
