"""easy-VQA: unpacking, validated reading, kinds of questions, and image labels from questions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.starter.wheels import make_wheel
from vila.core.errors import DataError
from vila.starter import easy_vqa
from vila.starter.easy_vqa import (
    COLOURS,
    KINDS,
    SHAPES,
    Question,
    group_by_image,
    image_labels,
    obtain_easy_vqa,
    question_kind,
    read_questions,
)

ROWS = [["what shape is present?", "circle", 0], ["is there a red shape?", "no", 7], ["is a circle present?", "yes", 0]]

# Every form of the package; {} is a shape ("circle") or a colour ("red shape").
ASKED = ["does the image contain a {}?", "is a {} present?", "is there a {} in the image?", "is there a {}?"]
NEGATED = [
    "does the image not contain a {}?",
    "is no {} present?",
    "is there not a {} in the image?",
    "is there not a {}?",
]
WHAT_COLOUR = ["what color is the {}?", "what is the color of the {}?"]
WHAT_SHAPE = ["what shape does the image contain?", "what shape is in the image?", "what shape is present?"]


def every_form() -> dict[str, str]:
    """All questions that the package holds, and their kinds."""
    tinted = [f"{colour} shape" for colour in COLOURS]
    kinds = {form.format(thing): "what color" for form in WHAT_COLOUR for thing in (*SHAPES, "shape")}
    kinds |= dict.fromkeys(WHAT_SHAPE, "what shape")
    kinds |= {f"what is the {thing}?": "what shape" for thing in tinted}
    for forms, suffix in ((ASKED, ""), (NEGATED, ", negated")):
        kinds |= {form.format(thing): f"yes/no shape{suffix}" for form in forms for thing in SHAPES}
        kinds |= {form.format(thing): f"yes/no color{suffix}" for form in forms for thing in tinted}
    return kinds


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        (tmp_path / split / "images").mkdir(parents=True)
        for image_id in (0, 7):
            (tmp_path / split / "images" / f"{image_id}.png").write_bytes(b"png")
        (tmp_path / split / "questions.json").write_text(json.dumps(ROWS))
    return tmp_path


def test_the_wheel_is_extracted_to_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members: dict[str, str | bytes] = {
        "easy_vqa/__init__.py": "raise SystemExit\n",
        "easy_vqa/data/answers.txt": "circle\nno\nyes",
        "easy_vqa/data/.DS_Store": b"\0",
        "easy_vqa/data/train/images/../../../../out.png": b"escaped",
    }
    for split in ("train", "test"):
        members[f"easy_vqa/data/{split}/questions.json"] = json.dumps(ROWS)
        members |= {f"easy_vqa/data/{split}/images/{i}.png": f"{split}{i}" for i in (0, 7)}
    wheel = make_wheel(tmp_path / "cache" / "wheels", members, "easy-vqa")
    monkeypatch.setattr(easy_vqa, "WHEEL", wheel)
    folder = obtain_easy_vqa(tmp_path / "cache")
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*") if path.is_file())
    assert [name.removeprefix("cache/parts/easy-vqa/") for name in found if "/easy-vqa/" in name] == [
        "README.md",
        "answers.txt",
        "part.json",
        "test/images/0.png",
        "test/images/7.png",
        "test/questions.json",
        "train/images/0.png",
        "train/images/7.png",
        "train/questions.json",
    ]
    assert not [name for name in found if "out.png" in name]
    assert (folder / "train" / "images" / "7.png").read_text() == "train7"
    assert read_questions(folder, "test") == [Question(*row) for row in ROWS]


def test_reading_needs_no_torch() -> None:
    code = "import sys, vila.starter.easy_vqa; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_questions_are_read_in_order_and_grouped_by_image(folder: Path) -> None:
    questions = read_questions(folder, "train")
    assert questions[1] == Question("is there a red shape?", "no", 7)
    groups = group_by_image(questions)
    assert list(groups) == [0, 7]
    assert groups[0] == [questions[0], questions[2]]


@pytest.mark.parametrize(
    "row",
    [
        ["what shape is present?", "circle"],
        ["what shape is present?", "circle", "0"],
        ["what shape is present?", "circle", True],
        ["what shape is present?", "circle", -1],
        ["", "circle", 0],
        ["what shape is present?", None, 0],
        {"question": "what shape is present?"},
    ],
)
def test_a_malformed_record_is_named_by_file_and_number(folder: Path, row: Any) -> None:
    path = folder / "train" / "questions.json"
    path.write_text(json.dumps([*ROWS, row]))
    with pytest.raises(DataError) as caught:
        read_questions(folder, "train")
    assert (caught.value.file, caught.value.record, caught.value.value) == (str(path), 3, row)


def test_a_record_with_a_missing_image_is_named(folder: Path) -> None:
    path = folder / "test" / "questions.json"
    path.write_text(json.dumps([*ROWS, ["is there a circle?", "no", 8]]))
    with pytest.raises(DataError) as caught:
        read_questions(folder, "test")
    assert (caught.value.file, caught.value.record, caught.value.value) == (str(path), 3, "images/8.png")


def test_a_missing_or_malformed_file_is_named(folder: Path) -> None:
    path = folder / "train" / "questions.json"
    path.write_text("[[")
    errors = []
    for write in (lambda: None, lambda: path.write_text("{}"), path.unlink):
        write()
        with pytest.raises(DataError) as caught:
            read_questions(folder, "train")
        errors.append(caught.value)
    assert {error.file for error in errors} == {str(path)}
    assert errors[1].value == "dict"


def test_all_107_questions_have_their_kind() -> None:
    forms = every_form()
    assert len(forms) == 107
    assert {text: question_kind(text) for text in forms} == forms
    assert set(forms.values()) == set(KINDS)


@pytest.mark.parametrize(
    "text", ["", "?", "how many shapes are there?", "is there a shape?", "is there a red circle?", "what is this?"]
)
def test_a_question_of_unknown_kind_is_refused(text: str) -> None:
    with pytest.raises(DataError) as caught:
        question_kind(text)
    assert caught.value.value == text


@pytest.mark.parametrize(
    ("questions", "truth"),
    [
        ([], (None, None)),
        ([("what shape is present?", "circle")], ("circle", None)),
        ([("what is the teal shape?", "circle")], ("circle", "teal")),
        ([("what color is the triangle?", "red")], ("triangle", "red")),
        ([("what color is the shape?", "red")], (None, "red")),
        ([("is there a circle?", "yes"), ("is a red shape present?", "yes")], ("circle", "red")),
        ([("is there not a circle?", "no"), ("is no red shape present?", "no")], ("circle", "red")),
        ([("is there a circle?", "no")], (None, None)),
        ([("is there not a circle in the image?", "yes")], (None, None)),
        # Two of three shapes are absent: it is the third one.
        ([("is there a circle?", "no"), ("does the image not contain a triangle?", "yes")], ("rectangle", None)),
        ([(f"is there a {colour} shape?", "no") for colour in COLOURS if colour != "gray"], (None, "gray")),
        ([(f"is there a {colour} shape?", "no") for colour in COLOURS[2:]], (None, None)),
    ],
)
def test_labels_of_an_image_follow_from_its_questions(
    questions: list[tuple[str, str]], truth: tuple[str | None, str | None]
) -> None:
    assert image_labels(Question(text, answer, 3) for text, answer in questions) == truth


@pytest.mark.parametrize(
    "answers",
    [
        [("is there a circle?", "yes"), ("what shape is present?", "triangle")],
        [(f"is there a {shape}?", "no") for shape in SHAPES],
        [("is there a circle?", "circle")],
        [("what shape is present?", "red")],
    ],
)
def test_contradictory_answers_are_refused(answers: list[tuple[str, str]]) -> None:
    with pytest.raises(DataError) as caught:
        image_labels([Question(text, answer, 3) for text, answer in answers])
    text, answer = answers[-1]
    assert (caught.value.record, caught.value.value) == ("image 3", f"{text} - {answer}")
