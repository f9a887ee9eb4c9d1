"""Damaged annotations, answers, predictions and verdicts are errors that name file, record and field."""

import gzip
import json

import pytest

from tests.mutation.mutate import LFS_POINTER
from vila.core.errors import DataError
from vila.eval.benchmarks.easy_vqa import EasyVqa
from vila.eval.judge import read_verdicts
from vila.eval.predictions import read_answers, read_predictions, read_texts
from vila.eval.runner import merge_speed_parts

ROW = b'{"question_id": 1, "text": "yes"}\n'
FOREIGN = {
    "lfs": LFS_POINTER,
    "gzip": gzip.compress(ROW, mtime=0),
    "page": b"<!DOCTYPE html><p>404",
    "utf16": ROW.decode().encode("utf-16"),
    "zeros": b"\0" * 80,
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_another_kind_of_file_in_the_place_of_answers_is_named_once(tmp_path, content):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_answers(path)
    assert caught.value.file == str(path)
    assert caught.value.hint


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"question_id": ' + b"9" * 5000 + b"}", b'{"question_id": "\xff"}'])
def test_a_line_that_json_cannot_read_is_one_bad_line(tmp_path, line):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(ROW + line + b"\n")
    # A file that begins with a bracket is a list, so the line is the second.
    found = read_answers(path)
    assert len(found.answers) == 1
    assert [(error.file, error.record) for error in found.bad] == [(str(path), "line 2")]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\n "])
def test_a_list_of_answers_may_begin_with_a_byte_order_mark_or_white_space(tmp_path, start):
    path = tmp_path / "answers.json"
    path.write_bytes(start + b"[" + ROW + b"]")
    assert [answer.question_id for answer in read_answers(path).answers] == [1]


@pytest.mark.parametrize(
    ("line", "field"),
    [
        (b"[]", "id"),
        (b'{"id": 5, "text": "x"}', "id"),
        (b'{"id": [], "text": "x"}', "id"),
        (b'{"id": "a", "text": 5}', "text"),
        (b'{"id": "a", "error": {}}', "error"),
        (b'{"id": "a"}', "text"),
        (b"[" * 100_000, None),
        (b"9" * 5000, None),
        (b'"\xff"', None),
    ],
)
def test_a_damaged_prediction_is_named_with_its_line_and_field(tmp_path, line, field):
    path = tmp_path / "part-0.jsonl"
    path.write_bytes(b'{"id": "a", "text": "x"}\n' + line + b"\n")
    with pytest.raises(DataError) as caught:
        read_predictions(tmp_path, ["a"])
    assert (caught.value.file, caught.value.record, caught.value.field) == (str(path), "line 2", field)


@pytest.mark.parametrize("content", [b"true", b"{}", b"[]", b"5", b'[["?", "yes", 1]]', b'[["", "yes", 1]]'])
def test_questions_of_easy_vqa_that_are_none_are_named(tmp_path, content):
    path = tmp_path / "test" / "questions.json"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        EasyVqa(tmp_path).items()
    assert caught.value.file == str(path)


@pytest.mark.parametrize("content", [b"\xff\n", b"[" * 100_000, b"9" * 5000, LFS_POINTER])
def test_replies_that_cannot_be_read_are_named(tmp_path, content):
    path = tmp_path / "replies.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_verdicts(path)
    assert caught.value.file == str(path)


@pytest.mark.parametrize(
    ("part", "before", "file", "field"),
    [
        ({"answered": "x"}, None, "speed-0.json", "answered"),
        ({}, None, "speed-0.json", "answered"),
        ({"answered": 2, "tokens": 1, "prompt_tokens": 1}, {"seconds": "x", "answered": 1}, "speed.json", "seconds"),
        ({"answered": 2, "tokens": [], "prompt_tokens": 1}, None, "speed-0.json", "tokens"),
    ],
)
def test_damaged_times_are_named(tmp_path, part, before, file, field):
    (tmp_path / "speed-0.json").write_text(json.dumps(part))
    if before is not None:
        (tmp_path / "speed.json").write_text(json.dumps(before))
    with pytest.raises(DataError) as caught:
        merge_speed_parts(tmp_path, 1.0)
    assert (caught.value.file, caught.value.field) == (str(tmp_path / file), field)


@pytest.mark.parametrize(
    ("line", "record", "field"),
    [('{"text": "yes"}', "line 2", "id"), ('{"id": "b"}', "line 2", "text"), ("[]", "line 2", "id"), ("", None, "id")],
)
def test_answers_that_lack_a_field_or_a_question_are_named(tmp_path, line, record, field):
    path = tmp_path / "predictions.jsonl"
    path.write_text(f'{{"id": "a", "text": "no"}}\n{line}\n')
    with pytest.raises(DataError) as caught:
        read_texts(path, ["a", "b"])
    assert (caught.value.file, caught.value.record, caught.value.field) == (str(path), record, field)
