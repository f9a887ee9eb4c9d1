"""`vila plan`: printed estimate, JSON, and the error for a recipe that does not fit."""

import json
import re

import pytest

from tests.cli.printed import counts, words
from vila.core.errors import ConfigError, UnknownNameError


def test_a_recipe_that_fits_is_printed_in_lines(vila):
    code, out, err = vila("plan", "vila_7b/3_sft", "--gpus", "8xA100-80G")
    assert (code, err) == (0, "")
    printed = dict(line.split(maxsplit=1) for line in out.splitlines() if line and not line.startswith(" "))
    assert words(printed["recipe"]) >= {"vila_7b_3_sft", "8xA100-80G", "312"}
    assert words(printed["parameters"]) >= {"7,062,902,784", "6,759,395,328"}
    assert [int(number) for number in re.findall(r"\d+", printed["step"])] == [128, 8, 16, 1]
    assert counts(out)["samples"] == 128  # the published batch
    assert re.fullmatch(r"[\d.]+ of [\d.]+ GiB usable: weights .*", printed["peak"])
    assert "26%" in words(printed["time"])
    (source,) = (line for line in out.splitlines() if "sharegpt4v_mix738k_remove_sa.json" in line)
    assert "738" in words(source)


def test_the_object_for_programs_holds_the_same_numbers(vila):
    code, out, err = vila("plan", "vila_7b/1_align", "--gpus", "8xA100-80G", "--mfu", "0.5", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["fits"]
    assert facts["machine"]["text"] == "8xA100-80G"
    assert facts["trainable"]["projector"] == facts["parameters"]["projector"] == 20_979_712
    assert sum(facts["trainable"].values()) == 20_979_712
    parts = ("weights", "gradients", "optimizer", "gathered", "activations", "working")
    assert facts["memory"]["total"] == sum(facts["memory"][name] for name in parts)
    assert facts["duration"]["mfu"] == 0.5
    assert facts["batch"]["samples"] == 256


def test_a_recipe_that_does_not_fit_is_an_error_with_configurations_that_fit(vila):
    code, out, _ = vila("plan", "vila_7b/3_sft", "--gpus", "4xRTX-4090")
    assert code == 2
    assert "peak" in words(out)  # the numbers are shown all the same
    assert (vila.error.field, vila.error.value) == ("--gpus", "4xRTX-4090-24G")
    assert words(vila.error.hint) >= {"--gpus", "8xRTX-4090-24G", "stage.lora.rank=64"}


@pytest.mark.parametrize(
    ("arguments", "kind", "fields"),
    [
        (["vila_7b/3_sft", "--gpus", "8xT4"], ConfigError, {"field": "--gpus", "value": "8xT4"}),
        (
            ["vila_7b/3_sft", "--gpus", "24xA100"],
            ConfigError,
            {"field": "batch", "value": 128, "expected": "120 or 144"},
        ),
        (["vila_7b/4_sft"], UnknownNameError, {"name": "vila_7b/4_sft"}),
        (["vila_7b/3_sft", "batch.micron=1"], ConfigError, {"field": "batch.micron"}),
        (["vila_7b/3_sft", "model.path=nowhere"], ConfigError, {"field": "model.path", "value": "nowhere"}),
    ],
)
def test_errors_name_field_and_value(vila_error, arguments, kind, fields):
    error = vila_error("plan", *arguments)
    assert (type(error), error.exit_code) == (kind, 2)
    assert vars(error).items() >= fields.items()


def test_unknown_data_are_named_and_can_be_described(vila):
    mixture = "data.mixture=[{format: messages, path: mine.jsonl}]"
    code, out, _ = vila("plan", "vila_7b/3_sft", mixture)
    assert code == 0
    assert words(out) >= {"mine.jsonl", "--num-samples", "--text-tokens", "--images-per-sample"}
    code, out, _ = vila(
        "plan",
        "vila_7b/3_sft",
        mixture,
        "--num-samples",
        "1280",
        "--text-tokens",
        "100",
        "--images-per-sample",
        "2",
        "--json",
    )
    assert code == 0
    duration = json.loads(out)["duration"]
    assert duration["steps"] == 10
    assert duration["tokens"] == 1280 * (100 + 2 * 576)


def facts_of(vila, *arguments):
    code, out, err = vila("plan", "vila_7b/3_sft", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_a_recipe_with_data_of_its_own_is_not_a_published_one(vila, tmp_path):
    data = f"data.mixture=[{{format: messages, path: {tmp_path / 'mine.jsonl'}}}]"
    assert [facts_of(vila, *more)["is_published"] for more in ((), (data,), ("--num-samples", "1000"))] == [
        True,
        False,
        False,
    ]
    assert "published:" not in words(vila("plan", "vila_7b/3_sft", data)[1])


def test_a_file_that_only_has_the_name_of_a_published_set_is_not_taken_for_it(vila, tmp_path):
    own = tmp_path / "llava_v1_5_mix665k.json"
    data = f"data.mixture=[{{format: llava_json, path: {own}}}]"
    absent = facts_of(vila, data)
    assert (absent["is_published"], absent["data"]["samples"], absent["unknown"]) == (True, 665_298, [])
    own.write_text("[]")
    present = facts_of(vila, data)
    assert (present["is_published"], present["data"], present["unknown"]) == (False, None, [str(own)])
