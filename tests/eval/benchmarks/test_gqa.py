"""GQA: accuracy and further metrics worked out by hand, both locations of its files."""

import pytest

from tests.eval.benchmarks.written import SHORT, VICUNA, answers, jsonl, plain, whole_prompt
from tests.eval.checks import has_note, refused
from vila.eval.benchmark import BENCHMARKS, Answer
from vila.eval.benchmarks.gqa import Gqa

# Answer, truth, right for GQA, right for lmms-eval.
ROWS = [
    ("yes", "yes", True, True, "equal"),
    ("Yes", "yes", True, True, "letters are made small"),
    ("yes.", "yes", True, True, "a full stop at the end goes"),
    ("yes...", "yes", True, True, "all of them go"),
    ("yes!", "yes", False, True, "no other mark goes; for lmms-eval all do"),
    ("yes. ", "yes", False, True, "a space at the end keeps the full stop; lmms-eval strips"),
    (" yes", "yes", False, True, "nothing is stripped"),
    ("no", "yes", False, False, "wrong"),
    ("", "yes", False, False, "an empty answer is wrong"),
    ("t shirt", "t-shirt", False, False, "a space is no hyphen"),
    ("t-shirt", "t-shirt", True, True, "equal"),
    ("tshirt", "t-shirt", False, True, "lmms-eval takes hyphens out on both sides"),
    ("yes\nbecause", "yes", False, False, "a second line is part of the answer"),
    ("the table", "table", False, False, "articles stay"),
    ("TABLE", "table", True, True, "letters are made small"),
    ("table;", "table", False, True, "a semicolon stays"),
    ("tables", "table", False, False, "another word"),
    ("to the left", "to the left", True, True, "spaces within stay"),
    ("left.", "left", True, True, "a full stop at the end goes"),
    ("Left of it", "left", False, False, "more words"),
    ("\u00fcber", "uber", False, False, "accents stay"),
    ("blue", "blue", True, True, "equal"),
    ("...", "no", False, False, "nothing is left of it"),
    ("2", "two", False, False, "number words stay words"),
]
IDS = [f"2013072{number:02d}" for number in range(len(ROWS))]
TEXTS = {key: row[0] for key, row in zip(IDS, ROWS, strict=True)}


def annotation(
    answer, structural="query", *, group=None, question="What is it?", steps=("select: table (1)", "query: name")
):
    return {
        "question": question,
        "imageId": "n161313",
        "answer": answer,
        "isBalanced": True,
        "types": {"structural": structural, "semantic": "obj", "detailed": "categoryThis"},
        "groups": {"global": group, "local": None},
        "semantic": [dict(zip(("operation", "argument"), step.split(": ", 1), strict=True)) for step in steps],
    }


@pytest.fixture
def folder(tmp_path):
    rows = {
        key: annotation(row[1], "verify" if number < 9 else "query")
        for number, (key, row) in enumerate(zip(IDS, ROWS, strict=True))
    }
    unbalanced = {**annotation("left out"), "isBalanced": False}
    plain(tmp_path / "gqa" / "testdev_balanced_questions.json", {**rows, "99": unbalanced})
    return tmp_path


def test_each_answer_is_scored_by_its_rule(folder):
    result = Gqa(folder).score(answers(TEXTS))
    assert {mark.id: bool(mark.value) for mark in result.question_scores} == {
        key: row[2] for key, row in zip(IDS, ROWS, strict=True)
    }
    assert result.score == result.metrics["accuracy"] == pytest.approx(100 * 9 / 24)
    assert result.metrics["binary"] == pytest.approx(100 * 4 / 9)
    assert result.metrics["open"] == pytest.approx(100 * 5 / 15)
    assert result.metrics["by_structural_type"] == {
        "query": {"accuracy": pytest.approx(100 * 5 / 15), "questions": 15},
        "verify": {"accuracy": pytest.approx(100 * 4 / 9), "questions": 9},
    }


def test_lmms_eval_ignores_case_and_punctuation(folder):
    result = Gqa(folder).score(answers(TEXTS), "lmms-eval")
    assert [bool(mark.value) for mark in result.question_scores] == [row[3] for row in ROWS]
    assert result.score == pytest.approx(100 * 14 / 24)


def test_files_lie_where_vila_or_llava_has_them(folder, tmp_path):
    home = folder / "gqa"
    assert Gqa(home).score(answers(TEXTS)).score == pytest.approx(37.5)
    (home / "data").mkdir()
    (home / "testdev_balanced_questions.json").rename(home / "data" / "testdev_balanced_questions.json")
    for place in (folder, home, home / "data"):
        assert Gqa(place).score(answers(TEXTS)).score == pytest.approx(37.5)


def test_the_converted_file_scores_the_same(folder):
    converted = {key: text.rstrip(".").lower() for key, text in TEXTS.items()}
    assert Gqa(folder).score(answers(converted)).score == pytest.approx(37.5)


def test_missing_answers_are_refused_by_name_and_others_are_noted(folder):
    rows = answers(TEXTS)
    with refused("2 questions", IDS[0], IDS[1], field="gqa"):
        Gqa(folder).score(rows[2:])
    result = Gqa(folder).score([*rows[::-1], Answer(int(IDS[7]), "yes"), Answer("5", "yes"), Answer("99", "left out")])
    assert result.score == pytest.approx(100 * 10 / 24)  # the last answer is right
    assert has_note(result.notes, "1 questions") and has_note(result.notes, "2 answers")
    with refused("5", field="gqa"):
        Gqa(folder).score([Answer("5", "yes")])


def test_answers_that_repeat_other_questions_are_refused(folder):
    with refused("Who is she?", field="gqa"):
        Gqa(folder).score(answers(TEXTS, dict.fromkeys(TEXTS, f"Who is she?\n{SHORT}")))
    assert Gqa(folder).score(answers(TEXTS, dict.fromkeys(TEXTS, f"What is it?\n{SHORT}"))).score == pytest.approx(37.5)


def test_distances_of_distributions_by_hand(tmp_path):
    truths = {"1": "yes", "2": "yes", "3": "yes", "4": "no", "5": "red", "6": "red", "7": "x"}
    groups = {**dict.fromkeys("1234", "g1"), **dict.fromkeys("56", "g2"), "7": None}
    plain(
        tmp_path / "testdev_balanced_questions.json",
        {key: annotation(truth, group=groups[key]) for key, truth in truths.items()},
    )
    given = {"1": "yes", "2": "yes", "3": "maybe", "4": "no", "5": "blue", "6": "blue", "7": "y"}
    # g1: (2-3)^2/3 + (1-1)^2/1 = 1/3, 4 questions; g2: (0-2)^2/2 = 2, 2 questions; (4/3 + 4) / 6 / 100.
    assert Gqa(tmp_path).score(answers(given)).metrics["distribution"] == pytest.approx(8 / 900)
    alone = {"7": annotation("x")}
    plain(tmp_path / "testdev_balanced_questions.json", alone)
    result = Gqa(tmp_path).score(answers({"7": "x"}))
    assert result.metrics["distribution"] == 0
    assert has_note(result.notes, "group", "0")


def test_validity_and_plausibility_come_from_the_choices(tmp_path):
    common = annotation("color")
    common["types"]["detailed"] = "materialCommon"
    plain(tmp_path / "testdev_balanced_questions.json", {"1": annotation("red"), "2": annotation("red"), "3": common})
    given = answers({"1": "red", "2": "purple", "3": "shape"})
    result = Gqa(tmp_path).score(given)
    assert (result.metrics["validity"], result.metrics["plausibility"]) == (0, 0)
    assert "testdev_balanced_choices.json" in result.notes[0]
    one = {"valid": ["red", "purple"], "plausible": ["red"]}
    path = plain(tmp_path / "testdev_balanced_choices.json", dict.fromkeys("123", one))
    result = Gqa(tmp_path).score(given)
    # The third is valid and plausible: color, material or shape for questions on what two things have in common.
    assert (result.metrics["validity"], result.metrics["plausibility"]) == pytest.approx((100, 100 * 2 / 3))
    plain(path, {"1": one, "2": {"valid": []}, "3": one})
    with refused("plausible", file="testdev_balanced_choices.json", record="question 2"):
        Gqa(tmp_path).score(given)


def test_the_detailed_type_is_wanted_with_the_choices_alone(tmp_path):
    row = annotation("red")
    del row["types"]["detailed"]
    plain(tmp_path / "testdev_balanced_questions.json", {"1": row})
    assert Gqa(tmp_path).score(answers({"1": "red"})).score == 100
    plain(tmp_path / "testdev_balanced_choices.json", {"1": {"valid": ["red"], "plausible": ["red"]}})
    with refused(file="testdev_balanced_questions.json", record="question 1", field="types.detailed"):
        Gqa(tmp_path).score(answers({"1": "red"}))


@pytest.mark.parametrize(
    ("steps", "count", "rule"),
    [
        (("select: table (1)", "query: name"), 1, "asking for the name is no step"),
        (("select: table (1)", "query: color"), 2, "asking for something else is"),
        (("select: cat (2)", "relate: dog,on,s (3)", "exist: ?"), 2, "exist is none"),
        (("select: cat (2)", "choose name: cat|dog"), 1, "nor is choosing a name"),
        (("select: existing sign (2)", "verify color: red"), 1, "nor any whose words hold exist"),
        ((), 0, "no program"),
    ],
)
def test_steps_of_reasoning(tmp_path, steps, count, rule):
    plain(tmp_path / "testdev_balanced_questions.json", {"1": annotation("x", steps=steps, question="a b  c?")})
    result = Gqa(tmp_path).score(answers({"1": "x"}))
    assert result.metrics["by_steps"] == {str(count): {"accuracy": 100, "questions": 1}}, rule
    assert result.metrics["by_words"] == {"3": {"accuracy": 100, "questions": 1}}


@pytest.mark.parametrize("field", ["answer", "isBalanced", "types", "groups", "semantic", "question"])
def test_annotations_that_lack_something_are_refused(tmp_path, field):
    row = annotation("x")
    del row[field]
    plain(tmp_path / "testdev_balanced_questions.json", {"1": row})
    with refused(field, "gqa/download", file="testdev_balanced_questions.json", record="question 1"):
        Gqa(tmp_path).score(answers({"1": "x"}))


def test_the_whole_prompt(folder):
    rows = [
        {"question_id": key, "image": f"n{number % 2}.jpg", "text": f"Is it {number}?\n{SHORT}", "category": "default"}
        for number, key in enumerate(IDS[:4])
    ]
    jsonl(folder / "gqa" / "llava_gqa_testdev_balanced.jsonl", rows)
    items = BENCHMARKS["gqa"](folder, 0).items()
    assert whole_prompt(items[0]) == f"{VICUNA}Is it 0?\n{SHORT} ASSISTANT:"
    assert [item.id for item in items] == [IDS[0], IDS[2], IDS[1], IDS[3]]
    assert (items[0].truth, items[0].question_id, items[0].group) == ("yes", IDS[0], "n0.jpg")
    assert items[0].messages[0].parts[0].source == folder / "gqa" / "images" / "n0.jpg"
    (folder / "gqa" / "data" / "images").mkdir(parents=True)
    assert Gqa(folder).items()[0].messages[0].parts[0].source == folder / "gqa" / "data" / "images" / "n0.jpg"
    result = Gqa(folder, 2).score(answers({IDS[0]: "yes", IDS[2]: "no"}))
    assert (result.score, result.metrics["questions"]) == (50, 2)


def test_missing_files_are_named(tmp_path):
    with refused("llava_gqa_testdev_balanced.jsonl", "eval.zip", field="gqa"):
        Gqa(tmp_path)
    jsonl(tmp_path / "llava_gqa_testdev_balanced.jsonl", [{"question_id": "1", "image": "a.jpg", "text": "?"}])
    assert Gqa(tmp_path).items()[0].truth == ""
    with refused("testdev_balanced_questions.json", "download.html", field="gqa"):
        Gqa(tmp_path).score(answers({"1": "x"}))
