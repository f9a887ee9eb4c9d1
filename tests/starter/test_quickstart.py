"""The quickstart on tiny components: interrupted anywhere, it ends with the same model, predictions and report."""

import json
import shlex
from pathlib import Path

import pytest

import vila.starter.quickstart as quickstart
from tests.extras import call_command, hide_extras
from tests.other_process import HOST, PID, locked_elsewhere
from tests.pages import HtmlPage, markdown_rows, numbers
from tests.starter.tiny_run import write_easy_vqa, write_llm, write_vision
from vila.config.load import load_recipe
from vila.core.errors import ConfigError, DataError, DirectoryInUseError
from vila.core.files import sha256_tree
from vila.starter.quickstart import Quickstart, QuickstartOptions
from vila.train.model_card import base_models


class TinyJob(Quickstart):
    """Quickstart with sequences long enough for a byte-level tokenizer."""

    def recipe(self, stage):
        recipe = super().recipe(stage)
        return recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": 1024, "look_ahead": 8})})


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return {
        "llm": str(write_llm(folder / "llm")),
        "vision": str(write_vision(folder / "vision")),
        "easy_vqa": write_easy_vqa(folder / "easy-vqa"),
    }


@pytest.fixture
def job(parts, tmp_path, monkeypatch):
    monkeypatch.setenv("VILA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quickstart.easy_vqa, "obtain_easy_vqa", lambda cache, events: parts["easy_vqa"])
    monkeypatch.setattr(quickstart, "PERPLEXITY_TOKENS", 500)

    def make(name="run", events=quickstart.SILENT, **changes):
        facts = {"out": tmp_path / name, "minutes": 0.05, "llm": parts["llm"], "vision": parts["vision"], **changes}
        return TinyJob(QuickstartOptions(**facts), events)

    return make


class Breaks:
    """Events that raise KeyboardInterrupt when a task starts or advances for the n-th time."""

    def __init__(self, at):
        self.at, self.count = at, 0

    def _tick(self):
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt

    def started(self, task, total=None, unit=""):
        self._tick()

    def advanced(self, task, amount=1, **facts):
        self._tick()

    def log(self, text):
        pass

    def finished(self, task, summary=""):
        pass


def outcome(job):
    predictions = (job.out / "eval" / "easy_vqa" / "predictions.jsonl").read_text()
    report = json.loads((job.out / "report.json").read_text())
    models = [sha256_tree(job.out / name, "*.safetensors") for name in ("model", "model-int4")]
    return models, predictions, report["accuracy"], report["perplexity"], report["int4"]


def test_a_run_writes_model_predictions_and_report_and_prints_valid_commands(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = job()
    result = done.run()
    report = json.loads((done.out / "report.json").read_text())
    assert {"accuracy", "accuracy_by_type", "swapped_accuracy", "seconds", "tokens_per_second", "machine"} <= set(
        report
    )
    assert [stage["name"] for stage in report["stages"]] == ["1_align", "2_pretrain", "3_sft"]
    assert all(set(stage["caption_nll"]) == {"right", "swapped"} for stage in report["stages"])
    assert report["questions"] == 40
    assert report["accuracy"] == result["accuracy"]
    assert len(report["few_shot"]["images"]) == 3
    assert report["int4"]["bytes_after"] < report["int4"]["bytes_before"]
    assert report["int4"]["questions"] == 40
    # Files are named without spaces, and images relative to the run.
    assert not [path.name for path in done.out.rglob("*") if " " in path.name]
    shown = [*report["examples"], report["int4"]["example"]]
    for name in [*(one["image"] for one in shown), *report["few_shot"]["images"]]:
        assert name.startswith("../")
        assert (done.out / name).is_file()
    assert all(Path(one["image"]).is_file() for one in result["examples"])
    assert "perplexity before" in report["seconds"]
    page = (done.out / "report.html").read_text()
    assert "int4-quantization" in HtmlPage(page).sections
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert {p.name for p in done.out.iterdir()} >= {"model", "data", "steps", "eval", "report.html", "report.json"}
    hide_extras(monkeypatch)
    for command in result["commands"].values():
        program, *words = shlex.split(command)
        assert program == "vila"
        call_command(words, monkeypatch)


def test_an_interrupted_run_equals_an_uninterrupted_one(job):
    whole = job("whole")
    counter = Breaks(at=-1)
    whole.events = counter
    whole.run()
    moments = sorted({1 + place * (counter.count - 1) // 11 for place in range(12)})
    stopped = None
    for at in moments:
        stopped = job("stopped", events=Breaks(at))
        try:
            stopped.run()
        except KeyboardInterrupt:
            assert not list(stopped.out.glob("**/*.partial"))
    job("stopped").run()
    assert outcome(stopped) == outcome(whole)


def test_a_second_run_repeats_no_step(job, monkeypatch):
    first = job()
    first.run()
    monkeypatch.setattr(quickstart, "build", None)
    monkeypatch.setattr(quickstart, "run_benchmark", None)
    assert job().run()["accuracy"] == json.loads((first.out / "report.json").read_text())["accuracy"]


def test_files_of_an_earlier_version_are_read(job, parts, monkeypatch):
    first = job()
    first.run()
    steps = first.out / "steps"
    for path in steps.glob("*-*.json"):
        row = json.loads(path.read_text())
        path.unlink()
        (steps / f"{row.pop('name')}.json").write_text(json.dumps(row))
    facts = json.loads((first.out / "quickstart.json").read_text())
    (first.out / "quickstart.json").write_text(json.dumps({**facts, "llm": parts["llm"], "vision": parts["vision"]}))
    monkeypatch.setattr(quickstart, "build", None)
    monkeypatch.setattr(quickstart, "run_benchmark", None)
    job().run()
    assert not [path.name for path in steps.iterdir() if " " in path.name]


@pytest.mark.parametrize(
    ("name", "content", "field"),
    [
        ("quickstart.json", "[]", None),
        ("quickstart.json", "{", None),
        ("steps/test.json", "[]", None),
        ("steps/test.json", '{"seconds": "x", "result": 1}', "seconds"),
        ("steps/test.json", '{"seconds": 1}', "result"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(job, name, content, field):
    done = job()
    (done.out / "steps").mkdir(parents=True)
    (done.out / name).write_text(content)
    with pytest.raises(DataError) as caught:
        done._claim()
        done._step("test", lambda: 0)
    assert (caught.value.file, caught.value.field) == (str(done.out / name), field)


def test_other_settings_in_the_same_directory_are_refused(job):
    job()._claim()
    with pytest.raises(ConfigError) as caught:
        job(seed=1).run()
    assert caught.value.file == str(job().out) and numbers(caught.value.problem) == [0, 1]


@pytest.mark.parametrize(("name", "value"), [("minutes", 0), ("questions", -1)])
def test_invalid_options_are_refused(name, value):
    with pytest.raises(ConfigError) as caught:
        QuickstartOptions(**{name: value})
    assert caught.value.value == value


def test_budgets_scale_with_the_minutes(job):
    full, half = (job(f"m{minutes}", minutes=minutes) for minutes in (7, 3.5))
    for maker in (full, half):
        maker._claim()
        maker._parts()
    for stage in quickstart.STAGES:
        assert full.recipe(stage).budget.tokens == 2 * half.recipe(stage).budget.tokens


def test_a_directory_in_use_is_refused_with_host_and_pid(job, tmp_path):
    with locked_elsewhere(tmp_path / "run"), pytest.raises(DirectoryInUseError) as caught:
        job().run()
    assert (caught.value.file, caught.value.host, caught.value.pid) == (str(tmp_path / "run"), HOST, PID)


def test_the_model_card_names_licences_base_models_and_epochs(job, parts):
    done = job()
    done.run()
    text = (done.out / "model" / "README.md").read_text()
    assert float(markdown_rows(text)["passes over the data"][0]) > 0
    assert "easy-VQA" in text
    recipe = load_recipe("starter/3_sft", [f"model.path={done.out / 'model'}"])
    assert [Path(base.name).name for base in base_models(recipe)] == [
        Path(parts[key]).name for key in ("llm", "vision")
    ]


def test_no_name_in_the_directory_has_a_space(job):
    done = job()
    done.run()
    assert [path for path in done.out.rglob("*") if " " in path.name] == []
