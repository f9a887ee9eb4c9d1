"""Errors keep their type and fields when they are pickled, collected or located in a file."""

import pickle

import pytest

from vila.core.errors import (
    MISSING,
    ConfigError,
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
        ConfigError.collect("my.yaml", ["one", ConfigError("two", field="x")]),
        DataError("no text", file="a.json", record=3, field="conversations", value=None, hint="add one"),
        DownloadError("timed out", file="http://x/a"),
        QueueFullError("full", 2.5),
    ],
)
def test_an_error_survives_pickling(error):
    there = pickle.loads(pickle.dumps(error))
    assert (type(there), str(there), vars(there).keys()) == (type(error), str(error), vars(error).keys())
    assert (there.file, there.field, there.record, there.value) == (error.file, error.field, error.record, error.value)


def test_an_error_without_a_value_has_none_after_pickling():
    assert pickle.loads(pickle.dumps(DataError("x"))).value is MISSING


def test_collected_problems_keep_their_fields():
    one, two = ConfigError("unknown key", field="seeed", hint="did you mean 'seed'?"), ConfigError("two")
    both = ConfigError.collect("my.yaml", [one, two])
    assert (both.problems, both.file, both.field) == ((one, two), "my.yaml", None)
    alone = ConfigError.collect("my.yaml", [one])
    assert (alone.problems, alone.file, alone.field, alone.hint) == ((one,), "my.yaml", "seeed", one.hint)
    assert one.problems == (one,)


def test_a_single_problem_of_another_file_keeps_its_location():
    error = ConfigError.collect("checks", [ConfigError("no such file", file="a.yaml")])
    assert (error.file, error.problem) == ("checks", "a.yaml: no such file")


def test_exit_codes_of_interrupted_and_preempted_commands():
    assert (Interrupted.exit_code, Preempted.exit_code) == (130, 0)


def test_within_adds_file_and_record():
    error = DataError("no text", field="prompt").within("a.jsonl", "line 2")
    assert (error.file, error.record, error.field) == ("a.jsonl", "line 2", "prompt")
    assert DataError("x", file="a.jsonl", record=3).within("a.jsonl", 9).record == 3


def test_within_keeps_the_text_of_an_error_about_another_file():
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
def test_near_names_ignore_case_and_separators_and_accept_abbreviations(name, near):
    known = ["vicuna_v1", "llava_json", "llava_parquet", "flan_parquet", "messages"]
    assert sorted(near_names(name, known)) == near
    assert sorted(UnknownNameError("thing", name, known).near) == near
