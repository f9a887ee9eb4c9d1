"""`vila bench decode`: what it prints and what it refuses."""

import json

import pytest

from tests.cli.printed import cells, words
from vila.bench.model_shapes import SHAPES
from vila.cli.bench import SHAPE_NAMES

SHORT = ("--output-len", 4, "--num-iters", 1, "--check-tokens", 8)


@pytest.fixture(autouse=True)
def no_bandwidth(monkeypatch):
    monkeypatch.setattr("vila.bench.decode.read_bandwidth", lambda device: 1e9)


def test_a_shape_is_measured_under_every_load_and_written(vila, tmp_path):
    loads = ("--input-len", 5, "--input-len", 9, "--batch-size", 1, "--batch-size", 2)
    code, out, err = vila("bench", "decode", "--shape", "tiny", *loads, *SHORT, "--output", tmp_path / "d.json")
    assert code == 0, err
    # The header, the line below it, and a row per load; nothing is published about this shape.
    table = cells(out)[2:]
    assert [row[:2] for row in table] == [["tiny", "int4"]] * 4
    assert all("onnx" in words(row[2]) for row in table)
    results = json.loads((tmp_path / "d.json").read_text())["results"]
    assert [(r["load"]["context"], r["load"]["batch"]) for r in results] == [(5, 1), (5, 2), (9, 1), (9, 2)]
    assert results[0]["agreement"]["tokens"] == 8
    assert results[1]["agreement"] is None


def test_precisions_are_measured_one_after_the_other(vila):
    kinds = ("--precision", "int4", "--precision", "bfloat16", "--backend", "torch", "--json")
    code, out, err = vila("bench", "decode", "--shape", "tiny", *kinds, *SHORT)
    assert code == 0, err
    found = json.loads(out)
    assert [r["precision"] for r in found["results"]] == ["int4", "bfloat16"]
    assert found["machine"]["threads"] >= 1


def test_a_checkpoint_is_measured_as_it_is(vila, model):
    code, out, err = vila("bench", "decode", model, *SHORT)
    assert code == 0, err
    name, precision, backend, *_ = cells(out)[2]
    assert (name, backend) == ("model", "torch") and precision in ("float32", "bfloat16")


def test_the_names_of_the_help_are_those_of_the_shapes():
    assert tuple(SHAPES) == SHAPE_NAMES


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ((), {"field": "MODEL"}),
        (("m", "--shape", "tiny"), {"field": "MODEL"}),
        (("m", "--precision", "int4"), {"field": "--precision and --group-size"}),
        (("--shape", "vila-3b"), {"field": "--shape", "name": "vila-3b"}),
        (("--shape", "tiny", "--lm-head-bits", "5"), {"field": "--lm-head-bits", "value": 5}),
        (("none", "--backend", "torch", "--lm-head-bits", "8"), {"field": "--lm-head-bits", "value": 8}),
        (("--shape", "tiny", "--group-size", "96"), {"field": "group_size", "value": 96}),
    ],
)
def test_bad_flags_are_named(vila_error, flags, named):
    error = vila_error("bench", "decode", *flags)
    assert error.exit_code == 2
    assert vars(error).items() >= named.items()
