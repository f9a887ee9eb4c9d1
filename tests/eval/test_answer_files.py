"""Irregular answer files of all ten benchmarks: scored by the protocol, or refused with the id."""

import json
import random

import pytest

from tests.eval.checks import refused
from tests.eval.mini_datasets import TEN, truly, write_mini_datasets
from tests.pages import numbers
from vila.cli.score import score_file
from vila.core.errors import DataError
from vila.eval.benchmark import BENCHMARKS
from vila.eval.judge import read_cases
from vila.eval.predictions import prediction_record, read_answers

SCORED = tuple(name for name in TEN if name not in ("vqav2", "vizwiz"))
"""The two others have answers to their test splits in the miniature data, which only a server scores."""
ALL_WANTED = ("gqa", "mme", "vizwiz")
"""Those whose original stops when an answer is missing."""
ODD = (
    "",
    "\n",
    "a\nb\r\nc\td",
    "\u65b9\u5f62 \u00c4\u00df \U0001f600",
    "\u2028\x85\x1e",
    "YES",
    "b",
    "{}",
    "null",
    "x" * 9999,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_mini_datasets(tmp_path_factory.mktemp("data"))


@pytest.fixture
def opened(data):
    def open_(name):
        benchmark = BENCHMARKS[name](data, 0)
        return benchmark, [prediction_record(item, truly(0, item)) for item in benchmark.items()]

    return open_


def written(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def called(row):
    """Return the name of a record's question in messages: its id, or its image if questions share an id."""
    return str(row["question_id"]).split(".")[0].replace("/images/", "/")


def judged(benchmark, path):
    """Score and notes of a file; for server benchmarks the submitted rows and checks."""
    if benchmark.name in SCORED:
        result = score_file(benchmark, path, "upstream")
        return result.score, " ".join(result.notes)
    sent = benchmark.submission(read_answers(path).answers)
    return sent.rows, " ".join(sent.checks)


@pytest.mark.parametrize("name", TEN)
def test_the_order_of_rows_does_not_matter(opened, name, tmp_path):
    benchmark, rows = opened(name)
    ordered = judged(benchmark, written(tmp_path / "a.jsonl", rows))[0]
    random.Random(0).shuffle(rows)
    mixed = judged(benchmark, written(tmp_path / "b.jsonl", rows))[0]
    assert mixed == (ordered if name not in SCORED else pytest.approx(ordered))


@pytest.mark.parametrize("name", TEN)
def test_a_missing_answer_is_named(opened, name, tmp_path):
    benchmark, rows = opened(name)
    missing = rows.pop(1)
    path = written(tmp_path / "a.jsonl", rows)
    if name in ALL_WANTED:
        with pytest.raises(DataError) as caught:
            judged(benchmark, path)
        text = str(caught.value)
    else:
        text = judged(benchmark, path)[1]
    if name == "vqav2":  # the server's list is longer than the questions of the run
        assert {4.0, 1.0, 1001.0} <= set(numbers(text))
    else:
        assert called(missing) in text


@pytest.mark.parametrize("name", TEN)
def test_a_second_answer_is_named_and_never_joins_the_first_in_silence(opened, name, tmp_path):
    benchmark, rows = opened(name)
    duplicate = {**rows[0], "text": "a second answer"}
    path = written(tmp_path / "a.jsonl", [*rows, duplicate])
    try:
        text = judged(benchmark, path)[1]
    except DataError as error:
        text = str(error)
    assert called(duplicate) in text


@pytest.mark.parametrize("name", TEN)
def test_an_answer_to_a_question_that_there_is_not_is_named(opened, name, tmp_path):
    benchmark, rows = opened(name)
    other = "art/9999.jpg" if name == "mme" else 424242 if isinstance(rows[0]["question_id"], int) else "424242"
    path = written(tmp_path / "a.jsonl", [*rows, {**rows[0], "question_id": other, "id": ""}])
    try:
        text = judged(benchmark, path)[1]
    except DataError as error:
        text = str(error)
    assert str(other) in text


@pytest.mark.parametrize("name", SCORED)
def test_odd_answers_win_nothing_and_stop_nothing(opened, name, tmp_path):
    benchmark, rows = opened(name)
    for number, row in enumerate(rows):
        row["text"] = ODD[number % len(ODD)]
    result = score_file(benchmark, written(tmp_path / "a.jsonl", rows), "upstream")
    # POPE takes everything for yes that has no "no" in it; YES or a letter may be right where they are asked for.
    easy = {"YES", "b"} | (set(ODD) if name == "pope" else set())
    assert [mark.answer for mark in result.question_scores if mark.value and mark.answer not in easy] == []
    assert len(result.question_scores) > 1


@pytest.mark.parametrize("name", TEN)
def test_a_truncated_line_is_named(opened, name, tmp_path):
    benchmark, rows = opened(name)
    path = written(tmp_path / "a.jsonl", rows)
    path.write_bytes(path.read_bytes()[:-20])
    assert [(error.file, error.record) for error in read_answers(path).bad] == [(str(path), f"line {len(rows)}")]
    if name in SCORED:
        with refused(f"a.jsonl, line {len(rows)}: "):
            score_file(benchmark, path, "upstream")


@pytest.mark.parametrize("name", TEN)
def test_answers_to_another_benchmark_are_refused_or_noted(opened, name, tmp_path):
    benchmark, _ = opened(name)
    other = "textvqa" if name != "textvqa" else "gqa"
    with refused(name):
        judged(benchmark, written(tmp_path / "a.jsonl", opened(other)[1]))


@pytest.mark.parametrize(
    ("line", "mention"),
    [
        (b'{"question_id": "a", "text": "\xff"}', "UTF-8"),
        (b'{"question_id": "a", "text": "\\ud800"}', "surrogate"),
        (b'{"question_id": "\\ud800", "text": "a"}', "surrogate"),
        (b"[" * 100_000, "JSON ("),
        (b'{"question_id": ' + b"1" * 5000 + b"}", "JSON ("),
        (bytes(100), "zero bytes"),
        (b'{"question_id": 1.5, "text": "x"}', "question_id"),
        (b'{"question_id": true, "text": "x"}', "question_id"),
        (b'{"question_id": "a", "text": null}', "text"),
        (b'{"question_id": "a", "text": ["x"]}', "['x']"),
        (b"[1, 2]", "[1, 2]"),
    ],
)
def test_invalid_line_is_named(tmp_path, line, mention):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"question_id": "b", "text": "y"}\n' + line + b"\n")
    found = read_answers(path)
    assert [row.text for row in found.answers] == ["y"]
    (error,) = found.bad
    assert (error.file, error.record) == (str(path), "line 2")
    assert mention in str(error)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (json.dumps([{"question_id": 1, "text": "x"}]).encode("utf-16"), "UTF-16"),
        (json.dumps({"question_id": 1, "text": "x"}, indent=1).encode(), "several lines"),
        (json.dumps({"data": [{"question_id": 1, "text": "x"}]}).encode(), "'data'"),
        (b'[{"question_id": 1, "text": "x"}]\nmore', "text after"),
        (b'[{"question_id": 1, "text": "x"}', "end of the file"),
        (b"question_id,text\n1,x\n", "CSV"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ],
)
def test_a_file_of_something_else_than_answers_is_one_fault(tmp_path, content, word):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_answers(path)
    assert caught.value.file == str(path) and word in caught.value.problem
    with refused(file=path.name):
        read_cases(path, "video_qa")


def test_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"question_id": 1, "text": "x"}\r\n\r\n{"question_id": 2, "text": "y"}'
    )
    found = read_answers(tmp_path / "a.jsonl")
    assert ([row.text for row in found.answers], found.bad) == (["x", "y"], ())


def test_chunks_are_read_once_and_in_order_beside_their_merged_file(opened, tmp_path):
    _, rows = opened("gqa")
    for number in range(9):
        written(tmp_path / f"12_{number + 2}.jsonl", rows[number : number + 1])
    written(tmp_path / "merge.jsonl", rows)
    assert [row.question_id for row in read_answers(tmp_path).answers] == [row["question_id"] for row in rows]
    written(tmp_path / "8_0.jsonl", rows)
    with refused("8_0.jsonl, 12_2.jsonl"):
        read_answers(tmp_path)


def test_a_merged_file_is_parsed_alone_beside_chunks_of_other_names(opened, tmp_path):
    _, rows = opened("gqa")
    for name in ("chunk_0", "merge"):
        written(tmp_path / f"{name}.jsonl", rows)
    assert [row.question_id for row in read_answers(tmp_path).answers] == [row["question_id"] for row in rows]


def test_a_folder_of_our_own_gives_its_predictions_and_not_its_scores(opened, tmp_path):
    _, rows = opened("gqa")
    written(tmp_path / "predictions.jsonl", rows)
    written(tmp_path / "question_scores.jsonl", [{"id": row["id"], "value": 1.0, "answer": "z"} for row in rows])
    assert [row.text for row in read_answers(tmp_path).answers] == [row["text"] for row in rows]
