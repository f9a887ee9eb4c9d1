"""Errors travel between processes and say the same there."""

import pickle

import pytest

from vila.core.errors import MISSING, DataError, DownloadError, Interrupted, Preempted, QueueFullError, UnknownNameError


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
