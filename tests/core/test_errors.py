"""Errors travel between processes and say the same there."""

import pickle

import pytest

from vila.core.errors import (
    MISSING,
    DataError,
    DownloadError,
    Interrupted,
    MediaError,
    Preempted,
    QueueFullError,
    UnknownNameError,
    near_names,
)


@pytest.mark.parametrize(
    "error",
    [
        UnknownNameError("format", "jsonl", ["json", "parquet"]),
        DataError("no text", file="a.json", record=3, field="conversations", value=None, hint="add one"),
        DownloadError("timed out", file="http://x/a"),
        QueueFullError("full", 2.5),
    ],
)
def test_an_error_survives_the_way_to_another_process(error):
    there = pickle.loads(pickle.dumps(error))
    assert (type(there), str(there), vars(there)) == (type(error), str(error), vars(error))


def test_an_error_without_a_value_has_none_after_pickling():
    assert pickle.loads(pickle.dumps(DataError("x"))).value is MISSING


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (DataError("no text"), "no text"),
        (DataError("no text", file="a.json", record=3), "a.json, record 3: no text"),
        (
            DataError("unknown key", field="optim.x", hint="did you mean 'y'?"),
            "optim.x: unknown key; did you mean 'y'?",
        ),
        (
            DataError(file="config.json", field="rope.type", value="su", expected="linear or llama3"),
            "config.json: rope.type: got 'su', expected linear or llama3",
        ),
        (DataError("wrong", value="a" * 500), "wrong, got '" + "a" * 119 + "..."),
    ],
)
def test_one_renderer_writes_the_message(error, text):
    assert str(error) == text


def test_being_preempted_is_no_failure():
    assert (Interrupted.exit_code, Preempted.exit_code) == (130, 0)


def test_an_error_takes_the_file_and_record_that_hold_the_text():
    error = DataError("no text", field="prompt").within("a.jsonl", "line 2")
    assert (error.file, error.record, error.field) == ("a.jsonl", "line 2", "prompt")
    assert DataError("x", file="a.jsonl", record=3).within("a.jsonl", 9).record == 3


def test_an_error_about_another_file_keeps_its_text_as_the_problem():
    error = MediaError("no such file", file="a.png", hint="check the path").within("a.jsonl", "line 2")
    assert (error.file, error.record, error.hint) == ("a.jsonl", "line 2", None)
    assert str(error) == "a.jsonl, line 2: a.png: no such file; check the path"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("vicuna_v2", ["vicuna_v1"]),
        ("VICUNA-V1", ["vicuna_v1"]),
        ("vicuna", ["vicuna_v1"]),
        ("llava", ["llava_json"]),
        ("parquet", ["flan_parquet", "llava_parquet"]),
        ("gguf", []),
        ("ll", []),
    ],
)
def test_near_names_forgive_case_dashes_and_missing_parts(name, near):
    known = ["vicuna_v1", "llava_json", "llava_parquet", "flan_parquet", "messages"]
    assert sorted(near_names(name, known)) == near
    assert sorted(UnknownNameError("thing", name, known).near) == near
