"""Commands of the original's README run unchanged, and `--query` means what it meant there, id for id."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.layouts.published import FIXTURES
from vila.chat.templates import VICUNA
from vila.cli import run
from vila.core.errors import MISSING, ConfigError, MediaError
from vila.model.loading import open_checkpoint

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
CHECKPOINTS = {"v1": "llava-vicuna-tiny-mlp2x", "v15": "vila15-llama-tiny-siglip70-downsample"}
QUERIES = {
    ("v1", "c02_one_middle"): "Look at <image> and tell me the color of the car.",
    ("v1", "c04_two_first"): "Compare the first image with the second image.",
    ("v15", "c01_one_first"): "<image>\\nDescribe the image in detail.",
    ("v15", "c04_two_first"): "<image-placeholder>\\n<image>\\nCompare the first image with the second image.",
}


@pytest.mark.parametrize(("layout", "name"), QUERIES)
def test_the_answer_is_the_one_that_the_original_computed(vila, layout, name):
    case = json.loads((GOLDEN / layout / "cases" / name / "case.json").read_text())
    files = ",".join(str(GOLDEN / "pixels" / image) for image in case["images"])
    code, out, err = vila(
        *("run", "--model-path", GOLDEN / layout / "checkpoints" / CHECKPOINTS[layout], "--conv-mode", "vicuna_v1"),
        *("--query", QUERIES[layout, name], "--image-file", files),
        *("--max_new_tokens", 24, "--num_beams", 1, "--dtype", "float32", "--json", "--logprobs", 1),
    )
    assert code == 0, err
    facts = json.loads(out)
    assert facts["prompt_tokens"] == case["spliced_length"]
    # Ids: decoders differ over bytes that are no text.
    assert [token["id"] for token in facts["logprobs"]] == case["greedy_new_ids"]


@pytest.mark.parametrize(
    ("query", "files", "turn"),
    [
        ("<image>\\n What is it?", ["p.png"], "<image>\n What is it?"),
        ("What is it?", ["p.png"], "<image>\nWhat is it?"),
        ("Compare.", ["p.png", "p.png"], "<image>\n<image>\nCompare."),
        ("A <image-placeholder> or a <image>?", ["p.png", "p.png"], "A <image> or a <image>?"),
    ],
)
def test_a_query_gives_the_ids_of_the_rendered_vicuna_prompt(vila, tmp_path, image, monkeypatch, query, files, turn):
    folder = FIXTURES["v1-mlp2x"](tmp_path / "model").folder
    prompts = []

    def fit(config, processor, messages, sampling):
        prompts.append(processor.prompt(messages).ids)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "check_fit", fit)
    names = ";".join(str(tmp_path / name) for name in files)
    flags = ("--model-name", folder, "--conv-mode", "vicuna_v1", "--image-file", names, "--sep", ";")
    assert vila("run", *flags, "--query", query)[0] == 130
    processor = open_checkpoint(folder).processor
    rendered = f"{VICUNA} USER: {turn} ASSISTANT:"
    expected = processor(text=rendered, images=[image] * len(files), return_tensors=None)["input_ids"][0]
    assert prompts == [expected]


def test_the_command_of_the_readme_runs_unchanged(tmp_path, image):
    folder = FIXTURES["v1-mlp2x"](tmp_path / "model").folder
    result = subprocess.run(
        [
            *(sys.executable, ROOT / "scripts" / "run_llava.py", "--model-path", folder, "--conv-mode", "vicuna_v1"),
            *("--query", "<image>\\n Please describe the traffic condition.", "--image-file", "p.png"),
            *("--max_new_tokens", "4"),
        ],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("\n")


def test_model_base_names_the_llm_of_a_lora(vila, tmp_path, image):
    written = FIXTURES["v1-lora"](tmp_path / "model")
    arguments = ("run", written.folder, "--template", "vicuna_v1", "-p", "x", "--max-new-tokens", 2)
    assert vila(*arguments, "--model-base", written.base)[0] == 0
    assert vila(*arguments)[0] == 1


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (("--num_beams", "3"), "--num-beams", 3),
        (("--load-4bit",), "--load-4bit", MISSING),
        (("--load_8bit",), "--load-8bit", MISSING),
        (("other",), "MODEL", "other"),
        (("--template", "v0", "--conv-mode", "v1"), "--template", "v0"),
        (("-p", "x"), "--query", MISSING),
        (("--image-file", "a.png,,b.png"), "--image-file", "a.png,,b.png"),
        (("--image-file", "a.png", "--sep", ""), "--sep", MISSING),
    ],
)
def test_unsupported_and_contradictory_flags_are_refused(vila_error, arguments, field, value):
    error = vila_error("run", "--model-path", "m", "--query", "x", *arguments)
    assert (type(error), error.field, error.value) == (ConfigError, field, value)


def test_the_line_break_after_an_image_does_not_depend_on_the_template(vila, model, image):
    code, out, _ = vila("run", model, "--query", "what?", "--image-file", image, "--max_new_tokens", 1, "--json")
    assert code == 0
    assert json.loads(out)["prompt_tokens"] == 4 + len("\nwhat?")


def test_a_marker_without_an_image_is_refused(vila_error, model):
    error = vila_error("run", model, "--query", "<image> x")
    assert (type(error), error.field) == (MediaError, "--query")


def test_the_same_model_may_be_named_twice(vila, model):
    assert vila("run", model, "--model-path", model, "--query", "x", "--max_new_tokens", 1)[0] == 0
