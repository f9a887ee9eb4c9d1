"""Every command that is not tested elsewhere for it, on damaged, empty, wrong or missing inputs: never a traceback."""

import gzip
import shutil

import pytest

from tests.mutation.mutate import LFS_POINTER
from vila.cli.main import app
from vila.core.errors import VilaError


def fill(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def deep(path):
    fill(path, b"[" * 100_000)


DAMAGES = {
    "missing": lambda path: None,
    "empty": lambda path: fill(path, b""),
    "directory": lambda path: path.mkdir(parents=True),
    "lfs": lambda path: fill(path, LFS_POINTER),
    "gzip": lambda path: fill(path, gzip.compress(b"{}", mtime=0)),
    "page": lambda path: fill(path, b"<!DOCTYPE html><p>404"),
    "zeros": lambda path: fill(path, b"\0" * 600),
    "binary": lambda path: fill(path, bytes(range(256)) * 4),
    "utf16": lambda path: fill(path, '{"a": 1}'.encode("utf-16")),
    "list": lambda path: fill(path, b"[1, null, [], {}]"),
    "number": lambda path: fill(path, b"5"),
    "null": lambda path: fill(path, b"null"),
    "object": lambda path: fill(path, b'{"x": null}'),
    "text": lambda path: fill(path, b"only words\n"),
    "deep": deep,
    "huge": lambda path: fill(path, b'{"a": ' + b"9" * 5000 + b"}"),
}
"""Ways to spoil the file at a path."""
OFTEN = ("missing", "directory", "lfs", "list", "object", "deep")
"""Those outside of the slow suite."""


def of_run(name):
    """Damage one file of a finished run of `vila eval`."""
    return lambda tmp: tmp / "run" / name


# Words of the command; the file that is spoilt, from the test's folder.
COMMANDS = {
    "compare eval.json": (("compare", "{tmp}/run", "{tmp}/other", "--output", "{tmp}/out"), of_run("eval.json")),
    "compare scores.json": (
        ("compare", "{tmp}/run", "{tmp}/other", "--output", "{tmp}/out"),
        of_run("pope/scores.json"),
    ),
    "compare question_scores.jsonl": (
        ("compare", "{tmp}/run", "{tmp}/other", "--output", "{tmp}/out"),
        of_run("pope/question_scores.jsonl"),
    ),
    "compare predictions": (
        ("compare", "{tmp}/run", "{tmp}/other", "--output", "{tmp}/out"),
        of_run("pope/predictions.jsonl"),
    ),
    "submit eval.json": (("submit", "{tmp}/run", "--output", "{tmp}/out"), of_run("eval.json")),
    "submit predictions": (("submit", "{tmp}/run", "--output", "{tmp}/out"), of_run("seed/predictions.jsonl")),
    "score predictions": (
        ("score", "pope", "--data", "{data}", "--predictions", "{tmp}/a.jsonl"),
        lambda tmp: tmp / "a.jsonl",
    ),
    "score compare": (
        ("score", "pope", "--data", "{data}", "--predictions", "{tmp}/run/pope", "--compare", "{tmp}/a.jsonl"),
        lambda tmp: tmp / "a.jsonl",
    ),
    "score judge": (
        ("score", "pope", "--data", "{data}", "--predictions", "{tmp}/run/pope", "--judge", "{tmp}/a.jsonl"),
        lambda tmp: tmp / "a.jsonl",
    ),
    "info config": (("info", "{tmp}/model"), lambda tmp: tmp / "model" / "config.json"),
    "info weights": (("info", "{tmp}/model"), lambda tmp: tmp / "model" / "model.safetensors"),
    "info tokenizer": (("info", "{tmp}/model"), lambda tmp: tmp / "model" / "tokenizer.json"),
    "info file": (("info", "{tmp}/thing"), lambda tmp: tmp / "thing"),
    "info pt": (("info", "{tmp}/thing.pt"), lambda tmp: tmp / "thing.pt"),
    "plan recipe": (("plan", "{tmp}/r.yaml"), lambda tmp: tmp / "r.yaml"),
    "plan model": (("plan", "starter/3_sft", "model.path={tmp}/model"), lambda tmp: tmp / "model" / "config.json"),
    "export config": (
        ("export", "{tmp}/model", "--format", "safetensors", "--output", "{tmp}/out"),
        lambda tmp: tmp / "model" / "config.json",
    ),
    "export weights": (
        ("export", "{tmp}/model", "--format", "safetensors", "--output", "{tmp}/out"),
        lambda tmp: tmp / "model" / "model.safetensors",
    ),
    "export search": (
        (
            "export",
            "{tmp}/model",
            "--format",
            "safetensors",
            "--output",
            "{tmp}/out",
            "--load-awq",
            "{tmp}/s.safetensors",
        ),
        lambda tmp: tmp / "s.safetensors",
    ),
    "quantize reuse": (
        ("quantize", "{tmp}/model", "--output", "{tmp}/out", "--load-awq", "{tmp}/s.safetensors"),
        lambda tmp: tmp / "s.safetensors",
    ),
    "quantize reuse pt": (
        ("quantize", "{tmp}/model", "--output", "{tmp}/out", "--load-awq", "{tmp}/s.pt"),
        lambda tmp: tmp / "s.pt",
    ),
    "quantize calib": (
        ("quantize", "{tmp}/model", "--output", "{tmp}/out", "--calib-data", "{tmp}/c.jsonl"),
        lambda tmp: tmp / "c.jsonl",
    ),
    "quantize calib recipe": (
        ("quantize", "{tmp}/model", "--output", "{tmp}/out", "--calib-data", "{tmp}/c.yaml"),
        lambda tmp: tmp / "c.yaml",
    ),
    "bench decode": (("bench", "decode", "{tmp}/model"), lambda tmp: tmp / "model" / "config.json"),
    "bench quality": (
        ("bench", "quality", "{tmp}/model", "--output", "{tmp}/out", "--easy-vqa", "{tmp}/easy"),
        lambda tmp: tmp / "easy" / "test" / "questions.json",
    ),
    "bench quality kept": (
        ("bench", "quality", "{tmp}/model", "--output", "{tmp}/out", "--methods", "full", "--num-eval-sequences", "1"),
        lambda tmp: tmp / "out" / "ways" / "full.json",
    ),
    "data index": (("data", "index", "{tmp}/d.jsonl"), lambda tmp: tmp / "d.jsonl"),
    "data stats": (("data", "stats", "{tmp}/d.jsonl"), lambda tmp: tmp / "d.jsonl"),
    "data stats recipe": (("data", "stats", "{tmp}/r.yaml"), lambda tmp: tmp / "r.yaml"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model, two finished runs and their data, copied for every case."""
    from tests.eval.mini_datasets import write_mini_datasets, write_mini_run
    from tests.quant.models import loud
    from vila.model.loading import save_model

    folder = tmp_path_factory.mktemp("whole")
    data = write_mini_datasets(folder / "data")
    save_model(*loud(layers=1, tower="clip"), folder / "kept" / "model")
    for name in ("run", "other"):
        write_mini_run(data, folder / "kept" / name, ("pope", "seed"))
    return folder


@pytest.mark.parametrize(
    "damage", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in DAMAGES]
)
@pytest.mark.parametrize("case", COMMANDS)
def test_a_damaged_input_is_a_vila_error_or_harmless(whole, tmp_path, monkeypatch, capsys, case, damage):
    words, target = COMMANDS[case]
    shutil.copytree(whole / "kept", tmp_path, dirs_exist_ok=True)
    path = target(tmp_path)
    if path.is_file():
        path.unlink()
    DAMAGES[damage](path)
    monkeypatch.chdir(tmp_path)
    filled = [word.format(tmp=tmp_path, data=whole / "data") for word in words]
    try:
        app(filled, prog_name="vila")
    except VilaError as error:
        assert str(error).strip()
    except OSError as error:
        # A directory where a result is to be written: the command line prints its name and the system's reason.
        assert error.filename
    except SystemExit as ended:
        assert ended.code in (0, 1, 2, None)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err


@pytest.mark.parametrize("cache", ["missing", "file"])
def test_doctor_with_a_cache_that_cannot_be(vila, tmp_path, monkeypatch, cache):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VILA_CACHE", str(tmp_path / cache / "below"))
    assert vila("doctor")[0] == 0


@pytest.mark.parametrize("value", ["[" * 3000, "0x_", "{"])
def test_a_value_that_yaml_cannot_read_is_named(vila_error, tmp_path, value):
    (tmp_path / "d.jsonl").write_text("{}")
    error = vila_error("data", "check", tmp_path / "d.jsonl", "--format-option", f"a={value}")
    assert (error.field, error.value) == ("--format-option", f"a={value}")
    vila_error("train", "starter/3_sft", "--dry-run", f"stage.lr={value}")
