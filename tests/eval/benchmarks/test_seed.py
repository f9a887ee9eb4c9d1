"""SEED-Bench: accuracy worked out by hand, by type and medium, submission file, damaged files."""

import pytest

from tests.eval.benchmarks.written import VICUNA, jsonl, plain, whole_prompt
from tests.eval.checks import has_note, refused
from tests.pages import numbers
from vila.core.reading import read_json
from vila.eval.benchmark import BENCHMARKS, Answer
from vila.eval.benchmarks.seed import Seed

KINDS = {"Scene Understanding": 1, "Text Understanding": 9, "Action Recognition": 10, "Procedure Understanding": 12}
# Kind, answer, truth, right for the original, right for lmms-eval.
ROWS = [
    (1, "A", "A", 1, 1, "equal"),
    (1, "a", "A", 0, 1, "casing counts; not for lmms-eval"),
    (1, "A.", "A", 0, 1, "the whole answer; lmms-eval reads the first character"),
    (1, "A. a house", "A", 0, 1, "no text may follow"),
    (1, " A", "A", 0, 1, "nothing is stripped"),
    (1, "A\n", "A", 0, 1, "nor a line break"),
    (1, "B", "A", 0, 0, "another letter"),
    (1, "", "A", 0, 0, "nothing"),
    (9, "D", "D", 1, 1, "equal"),
    (9, "Dog", "D", 0, 1, "lmms-eval takes any word with that letter"),
    (9, "(D)", "D", 0, 0, "the first character is a bracket"),
    (9, "The answer is D", "D", 0, 0, "no sentence is read"),
    (9, "B and C", "B", 0, 1, "lmms-eval takes the first of two"),
    (9, "B and C", "C", 0, 0, "and not the second"),
    (9, "C", "C", 1, 1, "equal"),
    (9, "\u0421", "C", 0, 0, "a Cyrillic letter looks alike"),
    (10, "B", "B", 1, 1, "equal"),
    (10, "b", "B", 0, 1, "casing counts"),
    (10, "B", "D", 0, 0, "another letter"),
    (10, "E", "D", 0, 0, "no such option"),
    (12, "a", "A", 0, 1, "casing counts"),
    (12, "B", "C", 0, 0, "another letter"),
    (12, "C\nbecause", "C", 0, 1, "a second line is part of the answer"),
    (12, "None", "A", 0, 0, "a word"),
]
# Right by the original: kind 1: 1 of 8, 9: 2 of 8, 10: 1 of 4, 12: 0 of 4. lmms-eval: 6 of 8, 4 of 8, 2 of 4, 2 of 4.


def name_of(number: int) -> str | int:
    """Videos have text for an id, images a number."""
    return f"v{number}" if ROWS[number][0] >= 10 else 1000 + number


@pytest.fixture
def folder(tmp_path):
    questions = [
        {
            "question_id": str(name_of(n)),
            "question": f"What is it, {n}?",
            "answer": truth,
            "choice_a": "a house",
            "question_type_id": kind,
            "data_type": "video" if kind >= 10 else "image",
            "data_id": f"pic{n // 2}",
        }
        for n, (kind, _, truth, *_) in enumerate(ROWS)
    ]
    plain(tmp_path / "seed_bench" / "SEED-Bench.json", {"question_type": KINDS, "questions": questions})
    return tmp_path


def answers(texts=None) -> list[Answer]:
    texts = texts or {n: row[1] for n, row in enumerate(ROWS)}
    return [Answer(name_of(n), text, f"What is it, {n}?\nA. a house") for n, text in texts.items()]


def test_scores_by_hand(folder):
    result = BENCHMARKS["seed"](folder, 0).score(answers())
    assert result.score == pytest.approx(100 * 4 / 24)
    assert result.metrics["image"] == pytest.approx(100 * 3 / 16)
    assert result.metrics["video"] == pytest.approx(100 * 1 / 8)
    assert result.metrics["by_type"] == pytest.approx(
        {
            "Scene Understanding": 12.5,
            "Text Understanding": 25.0,
            "Action Recognition": 25.0,
            "Procedure Understanding": 0.0,
        }
    )
    assert list(result.metrics["by_type"]) == list(KINDS)


def test_lmms_eval_reads_the_first_character(folder):
    result = Seed(folder).score(answers(), "lmms-eval")
    assert result.score == pytest.approx(100 * 14 / 24)
    assert result.metrics["image"] == pytest.approx(100 * 10 / 16)


@pytest.mark.parametrize(("place", "name"), [(3, "upstream"), (4, "lmms-eval")])
def test_score_of_each_example(folder, place, name):
    question_scores = Seed(folder).score(answers(), name).question_scores
    assert [row[-1] for row, mark in zip(ROWS, question_scores, strict=True) if mark.value != row[place]] == []


def test_a_category_without_a_right_answer_is_zero_and_noted(folder):
    notes = Seed(folder).score(answers()).notes
    assert has_note(notes, "Procedure Understanding", "0 %")


def test_missing_repeated_and_unknown_rows_are_scored_and_noted(folder):
    texts = {n: row[1] for n, row in enumerate(ROWS) if n != 0}
    rows = [Answer(1008, "A"), *reversed(answers(texts)), Answer(5, "A")]
    result = Seed(folder).score(rows)
    assert result.score == pytest.approx(100 * 3 / 24)  # without the first, which was right; the last 1008 counts
    for mentions in (("without an answer", ": 1000"), ("several answers", ": 1008"), ("unknown", ": 5")):
        assert has_note(result.notes, *mentions)


def test_a_text_for_an_image_id_is_not_found_as_in_upstream(folder):
    rows = answers()
    rows[0] = Answer("1000", "A")
    result = Seed(folder).score(rows)
    assert result.score == pytest.approx(100 * 3 / 24)
    assert has_note(result.notes, "question_id", "'1000'")


def test_answers_of_another_benchmark_are_refused(folder):
    with refused("OCR/1.jpg", field="seed"):
        Seed(folder).score([Answer("OCR/1.jpg", "yes")])


def test_submission_is_in_annotation_order(folder):
    upload = Seed(folder).submission(list(reversed(answers())))
    assert upload.format == "jsonl"
    assert upload.rows[2] == {"question_id": "1002", "prediction": "A."}
    assert upload.rows[-1] == {"question_id": "v23", "prediction": "None"}
    assert len(upload.checks) == 1 and 24 in numbers(upload.checks[0])
    with refused("1 questions", "1000", field="seed"):
        Seed(folder).submission(answers()[1:])


@pytest.mark.parametrize("field", ["answer", "question_type_id", "data_type", "question_id"])
def test_an_annotation_without_a_field_is_named(folder, field):
    path = folder / "seed_bench" / "SEED-Bench.json"
    whole = read_json(path)
    del whole["questions"][1][field]
    plain(path, whole)
    with refused(file="SEED-Bench.json", record="question 2", field=field):
        Seed(folder).score(answers())


def test_other_annotation_files_are_named(folder):
    path = folder / "seed_bench" / "SEED-Bench.json"
    whole = read_json(path)
    whole["questions"][0]["question_type_id"] = 13
    plain(path, whole)
    with refused(file="SEED-Bench.json", record="question 1", field="question_type_id", value=13):
        Seed(folder).score(answers())
    plain(path, {"questions": []})
    with refused(file="SEED-Bench.json", field="question_type"):
        Seed(folder).score(answers())
    with refused("SEED-Bench.json", "AILab-CVC/SEED-Bench"):
        Seed(folder / "nowhere")


def test_an_annotation_of_images_only_has_no_videos(folder):
    path = folder / "seed_bench" / "SEED-Bench.json"
    whole = read_json(path)
    plain(path, {**whole, "questions": whole["questions"][:16]})
    result = Seed(folder).score(answers({0: "A"}))
    assert result.metrics["video"] == 0
    assert has_note(result.notes, "videos", "undefined")
    assert has_note(result.notes, "SEED-Bench.json", "16 questions", "19,242")


def test_whole_prompts_and_items(folder):
    text = (
        "What is it, 0?\nA. a house\nB. a boat\nC. a tree\nD. a cat\n"
        "Answer with the option's letter from the given choices directly."
    )
    rows = [
        {"question_id": 1000, "image": "SEED-Bench-image/pic0", "text": text, "category": "Scene"},
        {"question_id": "v16", "image": "SEED-Bench-video-image/10_v16.png", "text": text, "category": "Action"},
    ]
    jsonl(folder / "seed_bench" / "llava-seed-bench.jsonl", rows)
    items = Seed(folder).items()
    assert whole_prompt(items[0]) == f"{VICUNA}{text} ASSISTANT:"
    assert items[0].messages[0].parts[0].source == folder / "seed_bench" / "SEED-Bench-image" / "pic0"
    assert [(item.id, item.question_id, item.truth, item.category) for item in items] == [
        ("1000", 1000, "A", "Scene Understanding"),
        ("v16", "v16", "B", "Action Recognition"),
    ]
    assert items[1].prompt == text
    assert Seed(folder, limit=1).score(answers({0: "A"})).score == 100


def test_the_published_size_scores_and_converts(tmp_path):
    count, num_images = 19_242, 14_233
    questions = [
        {
            "question_id": str(n) if n < num_images else f"v{n}",
            "answer": "ABCD"[n % 4],
            "question_type_id": n % 9 + 1 if n < num_images else 10 + n % 3,
            "data_type": "image" if n < num_images else "video",
        }
        for n in range(count)
    ]
    kinds = {f"kind {n}": n for n in range(1, 13)}
    plain(tmp_path / "SEED-Bench.json", {"question_type": kinds, "questions": questions})
    rows = [Answer(n if n < num_images else f"v{n}", "A") for n in range(count)]
    result = Seed(tmp_path).score(rows)
    assert result.score == pytest.approx(100 * 4811 / 19_242)  # every fourth, from 0
    assert result.notes == ()
    assert len(Seed(tmp_path).submission(rows).rows) == count
