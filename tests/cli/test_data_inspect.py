"""`vila data inspect`: images apart, characters whole, and a page with every image."""

import json

import numpy as np

from tests import tiny
from vila.chat.templates import find_template
from vila.chat.tokenize import SpanTokenizer, TokenizedSample, TokenSegment, tokenize_sample
from vila.cli.data_inspect import as_card, as_terminal_text, token_runs
from vila.core.types import Message, Sample


def tokenised(sample):
    tokenizer = SpanTokenizer(tiny.tokenizer())
    return tokenize_sample(sample, find_template("starter_qa"), tokenizer, lambda media: 4)


def test_neighbouring_images_are_a_run_each_and_all_on_the_card():
    images = [tiny.image(number) for number in range(3)]
    sample = Sample("s", (Message.of("user", *images, "which?"), Message.of("assistant", "this")))
    tokens = tokenised(sample)
    runs = token_runs(tokens, tiny.tokenizer(), 4)
    assert [run.text for run in runs if run.kind == "image"] == ["<image x 4>"] * 3
    assert sum(run.tokens for run in runs) == len(tokens)
    assert len(as_card(tokens, runs).images) == 3
    assert as_terminal_text(runs).plain.count("<image x 4>") == 3


def test_a_character_that_branches_divide_is_whole_in_each():
    # U+00E9 and U+00E8 share their first byte, so the prefix that both branches share ends inside the character.
    head = (Message.of("user", tiny.image(1)),)
    branches = tuple((Message.of("user", f"le {word}?"), Message.of("assistant", "\u00e9")) for word in "\u00e9\u00e8")
    runs = token_runs(tokenised(Sample("s", head, branches)), tiny.tokenizer(), 4)
    text = as_terminal_text(runs).plain
    assert "\ufffd" not in text
    assert [run.text[0] for run in runs if run.segment and run.kind == "context" and "?" in run.text] == [
        "\u00e9", "\u00e8",
    ]  # fmt: skip
    assert sum(run.kind == "supervised" and "\u00e9" in run.text for run in runs) == 2


def test_a_character_cut_at_a_label_boundary_is_shown_in_the_next_span():
    ids = tiny.tokenizer()("a\u00e9b\u00e9", add_special_tokens=False)["input_ids"][:-1]
    is_supervised = np.arange(len(ids)) >= 2
    tokens = TokenizedSample("s", np.array(ids), is_supervised, (TokenSegment(len(ids), 0, -1),), -1, ())
    runs = token_runs(tokens, tiny.tokenizer(), 4)
    assert [(run.kind, run.text) for run in runs] == [("context", "a"), ("supervised", "\u00e9b\ufffd")]


def test_inspect_writes_all_images_to_the_page(vila, model, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(tiny.image(number).source)
    parts = [{"type": "image", "path": f"{number}.png"} for number in range(3)]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    command = ("data", "inspect", tmp_path / "d.jsonl", "--model", model, "--html", tmp_path / "o.html")
    code, out, err = vila(*command)
    assert code == 0, err
    assert out.count("<image x 4>") == 3
    assert (tmp_path / "o.html").read_text().count("<img src=") == 3
    assert vila("data", "inspect", tmp_path / "d.jsonl")[0] == 2
    assert vila.error.hint.endswith("--model")
