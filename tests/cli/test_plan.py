"""`vila plan`: printed estimate, JSON, and the error for a recipe that does not fit."""

import json
import re

import pytest


def test_a_recipe_that_fits_is_printed_in_lines(vila):
    code, out, err = vila("plan", "vila_7b/3_sft", "--gpus", "8xA100-80G")
    assert (code, err) == (0, "")
    printed = dict(line.split(maxsplit=1) for line in out.splitlines() if line and not line.startswith(" "))
    assert printed["recipe"] == "vila_7b_3_sft on 8xA100-80G, 312 TFLOPS each"
    assert printed["parameters"] == "7,062,902,784, 6,759,395,328 trainable"
    assert printed["step"] == "128 samples = 8 GPUs x 16 x 1 accumulated"
    assert re.search(r"about 128 samples and [\d,]+ tokens; published: 128 samples", out)
    assert re.fullmatch(r"[\d.]+ of [\d.]+ GiB usable: weights .*", printed["peak"])
    assert "GPU-hours at 26% MFU" in printed["time"]
    assert "sharegpt4v_mix738k_remove_sa.json: 738 K conversations" in out


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
    code, out, err = vila("plan", "vila_7b/3_sft", "--gpus", "4xRTX-4090")
    assert code == 2
    assert "peak" in out  # the numbers are shown all the same
    assert "vila_7b_3_sft needs" in err
    assert ": --gpus 8xRTX-4090-24G" in err
    assert "stage.lora.rank=64" in err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["vila_7b/3_sft", "--gpus", "8xT4"], "A10, A100"),
        (["vila_7b/3_sft", "--gpus", "24xA100"], "expected 120 or 144"),
        (["vila_7b/4_sft"], "unknown recipe 'vila_7b/4_sft'"),
        (["vila_7b/3_sft", "batch.micron=1"], "micron"),
        (["vila_7b/3_sft", "model.path=nowhere"], "nowhere"),
        (["vila_7b/3_sft", "--mfu", "1.5"], "mfu"),
    ],
)
def test_what_is_wrong_is_named(vila, arguments, reason):
    code, _, err = vila("plan", *arguments)
    assert code == 2
    assert reason in err


def test_unknown_data_are_named_and_can_be_described(vila):
    mixture = "data.mixture=[{format: messages, path: mine.jsonl}]"
    code, out, _ = vila("plan", "vila_7b/3_sft", mixture)
    assert code == 0
    assert "mine.jsonl; give --num-samples, --text-tokens and --images-per-sample" in out
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


def test_nothing_published_is_said_of_a_recipe_with_data_of_its_own(vila, tmp_path):
    own = tmp_path / "mine.jsonl"
    _, out, _ = vila("plan", "vila_7b/3_sft", f"data.mixture=[{{format: messages, path: {own}}}]")
    assert "published:" not in out
    _, out, _ = vila("plan", "vila_7b/3_sft", "--num-samples", "1000")
    assert "published:" not in out


def test_a_file_that_only_has_the_name_of_a_published_set_is_not_taken_for_it(vila, tmp_path):
    own = tmp_path / "llava_v1_5_mix665k.json"
    data = f"data.mixture=[{{format: llava_json, path: {own}}}]"
    assert "665,298 conversations" in vila("plan", "vila_7b/3_sft", data)[1]  # not here yet
    own.write_text("[]")
    _, out, _ = vila("plan", "vila_7b/3_sft", data)
    assert "665,298" not in out
    assert "published:" not in out
    assert "unknown" in out
