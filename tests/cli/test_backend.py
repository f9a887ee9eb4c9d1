"""`--backend`, `--lm-head-bits`, `--threads` and `--prompt-lookup-tokens` of the commands that answer."""

import json

import pytest
import torch

from tests.cli.printed import counts, words
from tests.engine.onnx_fixtures import torch_engine
from vila.model.loading import save_model


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose heads the onnx backend takes."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    engine = torch_engine()
    save_model(engine.model, engine.processor, folder)
    return folder


def answer(vila, *arguments):
    code, out, err = vila("run", *arguments, "--json", "--dtype", "float32", "--max-new-tokens", 12)
    assert code == 0, err
    return json.loads(out), err


def test_both_backends_give_one_answer_and_log_their_name(vila, wide, image):
    by_torch, said = answer(vila, wide, "-i", image, "-p", "what?", "--backend", "torch")
    assert words(said) >= {"torch", "cpu", "float32"}
    by_onnx, said = answer(vila, wide, "-i", image, "-p", "what?", "--backend", "onnx", "--lm-head-bits", 32)
    assert words(said) >= {"onnx", "cpu", "float32", "32-bit"}
    assert by_onnx == by_torch
    assert answer(vila, wide, "-i", image, "-p", "what?") == (by_torch, "")


def test_threads_are_those_of_every_backend(vila, wide):
    before = torch.get_num_threads()
    try:
        _, said = answer(vila, wide, "-p", "what?", "--backend", "onnx", "--threads", 1)
        assert counts(said)["threads"] == 1
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_lookup_tells_what_it_tried_and_changes_no_answer(vila, wide):
    plain, _ = answer(vila, wide, "-p", "one one one one")
    ahead, _ = answer(vila, wide, "-p", "one one one one", "--prompt-lookup-tokens", 4)
    assert ahead == {**plain, "draft_tokens": ahead["draft_tokens"], "accepted_tokens": ahead["accepted_tokens"]}
    assert 0 <= ahead["accepted_tokens"] <= ahead["draft_tokens"]


def test_chat_takes_the_flags(vila, wide):
    code, out, err = vila(
        "chat", wide, "--backend", "onnx", "--prompt-lookup-tokens", 3, "--max-new-tokens", 4, stdin=b"hello\n"
    )
    assert code == 0
    assert "onnx" in words(err)
    assert out.count("vila> ") == 1


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (("--lm-head-bits", "7", "--backend", "onnx"), "--lm-head-bits"),
        (("--lm-head-bits", "8"), "--lm-head-bits"),
        (("--activation-bits", "4", "--backend", "onnx"), "--activation-bits"),
        (("--activation-bits", "16", "--backend", "torch"), "--activation-bits"),
        (("--prompt-lookup-tokens", "-1"), None),
        (("--backend", "tensorrt"), "--backend"),
    ],
)
def test_impossible_flags_are_refused_before_anything_is_read(vila_error, flags, field, monkeypatch):
    monkeypatch.setattr("vila.model.loading.open_checkpoint", None)
    error = vila_error("run", "no-such-model", "-p", "x", *flags)
    assert (error.exit_code, error.field) == (2, field)


def test_eval_refuses_an_impossible_backend(vila_error, wide, tmp_path):
    assert vila_error("eval", wide, "--data", tmp_path, "--lm-head-bits", 8).field == "--lm-head-bits"
