"""`vila quantize`: what it writes and prints, what it refuses, and that a kill costs nothing but time."""

import json
import os
import pickle
import random
import subprocess
import sys

import pytest
import torch

from tests.cli.printed import words
from tests.quant.models import loud
from vila.core.errors import ConfigError, DataError, LayoutError
from vila.model.layouts.detect import detect_layout
from vila.model.loading import save_model

TEXT = "\n\n".join(
    f"Paragraph {number} tells of {'rain and wind, ' * (number % 7 + 3)}and of nothing else." for number in range(40)
)
FLAGS = ("--group-size", "32", "--num-calib-sequences", "3")


@pytest.fixture(scope="module")
def loud_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize") / "model"
    # Heads 16 wide: the CPU's decoder takes no narrower ones.
    save_model(*loud(layers=3, num_attention_heads=2, num_key_value_heads=1), folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("method", ["rtn", "awq", "best"])
def test_the_model_is_written_and_answers(vila, loud_model, text, image, tmp_path, method):
    out = tmp_path / "out"
    code, shown, err = vila("quantize", loud_model, "--output", out, "--calib-data", text, "--method", method, *FLAGS)
    assert code == 0, err
    assert detect_layout(out).name == "awq-hf"
    summary = json.loads((out / "quantization.json").read_text())
    assert (summary["linears"], len(summary["blocks"]), summary["group_size"]) == (21, 3, 32)
    assert words(shown) >= {"21", "3", "32", summary["method"]}
    assert (summary["calibration"] is None) == (method == "rtn")
    assert method == "rtn" or summary["calibration"]["sha256"] in words(shown)
    assert ("--calib-data" in words(err)) == (method == "rtn")
    assert (out / "search.safetensors").is_file() == (method != "rtn")
    assert (out / "README.md").read_text().count("vila run .")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "text.txt", "p.png"}
    code, _, err = vila("run", out, "--image", image, "--prompt", "what?", "--max-new-tokens", 2)
    assert code == 0, err


def test_the_packaged_text_is_the_default_and_a_search_is_used_again(vila, loud_model, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert vila("quantize", loud_model, "--output", first, *FLAGS)[0] == 0
    assert json.loads((first / "quantization.json").read_text())["calibration"]["name"] == "packaged"
    code, _, err = vila("quantize", loud_model, "--output", second, *FLAGS, "--load-awq", first / "search.safetensors")
    assert code == 0, err
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_the_search_is_dumped_as_the_original_does_and_used_again(vila, vila_error, loud_model, text, tmp_path):
    out, cache = tmp_path / "out", tmp_path / "awq_cache" / "loud-w4-g32.pt"
    flags = (*FLAGS, "--calib-data", text)
    assert vila("quantize", loud_model, "--output", out, *flags, "--dump-awq", cache)[0] == 0
    assert [len(entry) for entry in torch.load(cache, weights_only=True)["scale"]] == [3] * 9
    assert vila("quantize", loud_model, "--output", tmp_path / "again", *flags, "--load-awq", cache)[0] == 0
    code, _, err = vila(
        "export", loud_model, "--format", "gguf-text", "--output", tmp_path / "gguf", "--load-awq", cache
    )
    assert code == 0, err
    refused = [
        (cache, "--method", "rtn"),
        (tmp_path / "x.safetensors",),
        (cache,),
        (tmp_path / "other" / "x.pt",),
    ]
    for given in refused:
        error = vila_error("quantize", loud_model, "--output", tmp_path / "other", *flags, "--dump-awq", *given)
        assert (type(error), error.field) == (ConfigError, "--dump-awq")
    assert not (tmp_path / "other").exists()


def test_a_recipe_calibrates_with_images(vila, loud_model, text, image, tmp_path):
    rows = [
        {"id": str(n), "image": "p.png", "conversations": [
            {"from": "human", "value": f"<image>\nwhat is number {n}?"}, {"from": "gpt", "value": "a shape"}]}
        for n in range(3)
    ]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(rows))
    recipe = tmp_path / "mine.yaml"
    entry = f"{{format: llava_json, path: {tmp_path / 'data.json'}, image_root: {tmp_path}}}"
    recipe.write_text(f"extends: starter/3_sft\ndata:\n  mixture:\n    - {entry}\n")
    flags = ("--calib-data", text, "--calib-data", recipe, "--num-calib-samples", 3, "--image-token-weight", 2)
    code, _, err = vila("quantize", loud_model, "--output", tmp_path / "out", *FLAGS, *flags)
    assert code == 0, err
    summary = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert summary["calibration"]["name"] == "text.txt+mine.yaml"
    assert summary["image_weight"] == 2


def bad_files(folder):
    """Files that are no calibration, and files that are no search."""
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("Too short.")
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1") * 400)
    (folder / "ids.jsonl").write_text('{"ids": [' + ", ".join(["99999"] * 512) + "]}\n")
    (folder / "other.pt").write_bytes(b"not a weight file")
    with (folder / "code.pt").open("wb") as stream:
        pickle.dump({"scale": os.system}, stream, protocol=2)


@pytest.mark.parametrize(
    ("flags", "kind", "fields"),
    [
        (("--calib-data", "{tmp}/empty.txt"), DataError, {"file": "{tmp}/empty.txt"}),
        (("--calib-data", "{tmp}/short.txt"), DataError, {"file": "short.txt", "field": "tokens"}),
        (("--calib-data", "{tmp}/latin.txt"), DataError, {"file": "{tmp}/latin.txt"}),
        (
            ("--calib-data", "{tmp}/ids.jsonl"),
            DataError,
            {"file": "{tmp}/ids.jsonl", "record": "line 1", "field": "ids", "value": 99999},
        ),
        (("--load-awq", "{tmp}/other.pt"), LayoutError, {"file": "{tmp}/other.pt"}),
        (("--load-awq", "{tmp}/code.pt"), LayoutError, {"file": "{tmp}/code.pt"}),
        (("--group-size", "128"), ConfigError, {"field": "group_size", "value": 128, "expected": "32"}),
        (("--image-token-weight", "0"), ConfigError, {"field": "image_weight", "value": 0.0}),
        (("--method", "rtn", "--scaling", "duo"), ConfigError, {"field": "--scaling"}),
        (("--load-awq", "{tmp}/none.pt", "--clipping", "all"), ConfigError, {"field": "--clipping"}),
        (("--overwrite", "--output", "{model}"), ConfigError, {"file": "{model}"}),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(vila_error, loud_model, tmp_path, flags, kind, fields):
    bad_files(tmp_path)
    before = sorted(tmp_path.iterdir())

    def filled(value):
        return value.format(tmp=tmp_path, model=loud_model) if isinstance(value, str) else value

    where = () if "--output" in flags else ("--output", tmp_path / "out")
    group = () if "--group-size" in flags else ("--group-size", "32")
    error = vila_error("quantize", loud_model, *where, *group, *map(filled, flags))
    assert type(error) is kind
    assert vars(error).items() >= {name: filled(value) for name, value in fields.items()}.items()
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_model_stays_and_a_quantized_model_is_no_source(vila, vila_error, loud_model, tmp_path):
    out = tmp_path / "out"
    assert vila("quantize", loud_model, "--output", out, "--method", "rtn", *FLAGS)[0] == 0
    error = vila_error("quantize", loud_model, "--output", out, "--method", "rtn", *FLAGS)
    assert (type(error), error.file) == (ConfigError, str(out))
    assert vila("quantize", loud_model, "--output", out, "--method", "rtn", *FLAGS, "--overwrite")[0] == 0
    error = vila_error("quantize", out, "--output", tmp_path / "again", "--method", "rtn", *FLAGS)
    assert isinstance(error, LayoutError)


CODE = """
import json, os, signal, sys, threading, time
import torch
torch.set_num_threads(1)
import vila.cli.quantize, vila.model.loading, vila.quant.calibration
from vila.cli.main import main
from vila.quant import quantize, resume_state

def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def arm(point):
    if isinstance(point, float):
        threading.Thread(target=lambda: (time.sleep(point), die()), daemon=True).start()
    elif point == "write":
        quantize.save_search = die
    else:
        save, left = resume_state.BlockResumeState.save, [point]
        def counted(self, index, found):
            left[0] -= 1
            save(self, index, found) if left[0] else die()
        resume_state.BlockResumeState.save = counted

words, points = json.loads(sys.argv[1])
for number, point in enumerate(points):
    child = os.fork()
    if not child:
        arm(point)
        try:
            main([*words, "--output", f"out{number}"])
        finally:
            os._exit(0)
    print(os.waitpid(child, 0)[1])
"""


def killed_and_resumed(vila, loud_model, text, folder, monkeypatch, points):
    """The same command until a SIGKILL at each point, and once more; how many were killed."""
    monkeypatch.chdir(folder)
    words = ["quantize", str(loud_model), "--calib-data", str(text), "--method", "best", *FLAGS]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps([words, points])], env=env, check=True, capture_output=True, text=True
    )
    statuses = [int(line) for line in done.stdout.splitlines() if line.isdigit()]
    assert vila(*words, "--output", "whole")[0] == 0
    whole = {path.name: path.read_bytes() for path in (folder / "whole").iterdir()}
    resumed = 0
    for number, status in enumerate(statuses):
        out = folder / f"out{number}"
        if status == 9 and not out.exists():
            resumed += 1
            assert vila(*words, "--output", out)[0] == 0
        elif status == 9:
            # A kill between publication and cleanup leaves hidden directories, which the next run removes.
            assert vila(*words, "--output", out, "--overwrite")[0] == 0
        assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    assert not list(folder.glob(".*"))
    return resumed


def test_killed_at_three_points_the_command_ends_with_the_same_bytes(vila, loud_model, text, tmp_path, monkeypatch):
    """In the search, in the rounding, and while the directory is written."""
    assert killed_and_resumed(vila, loud_model, text, tmp_path, monkeypatch, [2, 5, "write"]) == 3


@pytest.mark.slow
def test_killed_at_any_moment_the_command_ends_with_the_same_bytes(vila, loud_model, text, tmp_path, monkeypatch):
    generator = random.Random(0)
    moments = [generator.uniform(0.05, 2.0) for _ in range(10)]
    assert killed_and_resumed(vila, loud_model, text, tmp_path, monkeypatch, moments) >= 1
