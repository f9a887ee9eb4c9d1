"""Every command in an environment with the base dependencies only: it runs, or names the extra that it needs."""

import subprocess
import sys
from importlib import metadata

import pytest
from typer.main import get_command

from tests.cli.test_commands import usages
from tests.cli.test_compare import written
from tests.eval.mini_datasets import write_mini_datasets, write_mini_run
from tests.export.models import write_model
from tests.extras import ROOT, base_distributions, call_command, hide_extras
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.cli.main import app
from vila.config.load import save_recipe
from vila.core.errors import VilaError
from vila.core.optional import MissingExtraError

TEXT = "\n\n".join(f"Paragraph {number} tells of {'rain and wind, ' * (number % 7 + 3)}." for number in range(40))
RUNS, REFUSES = "runs", "refuses its input"
DATA = ("{tmp}/data.jsonl", "--format", "messages", "--image-root", "{tmp}", "--model", "{model}")
SHORT = ("--output-len", "2", "--num-iters", "1", "--check-tokens", "0")

# Arguments of every command, and what becomes of it: it runs, an extra is named, or input that is not there is refused.
COMMANDS = {
    "run": [
        (("{model}", "-i", "{image}", "-p", "what?", "--max-new-tokens", "1"), RUNS),
        (("{model}", "-p", "what?", "--backend", "onnx"), "onnx"),
    ],
    "chat": [(("{model}", "--max-new-tokens", "1"), RUNS), (("{model}", "--backend", "onnx"), "onnx")],
    "train": [
        (("{tmp}/recipe.yaml", "budget.tokens=100"), RUNS),
        (("{tmp}/recipe.yaml", "stage.lora.rank=2", "stage.llm_parts=[]", "output.dir={tmp}/lora"), "lora"),
        (("{tmp}/recipe.yaml", "monitor.trackers=[wandb]", "output.dir={tmp}/watched"), "pip install wandb"),
        (("vila_7b/1_align", "--dry-run"), RUNS),
    ],
    "plan": [(("vila_7b/3_sft", "--gpus", "8xA100-80G"), RUNS)],
    "eval": [
        (("{model}", "--data", "{tmp}/eval", "--benchmarks", "mme", "--limit", "2", "--output", "{tmp}/e"), RUNS),
        (("{model}", "--data", "{tmp}/eval", "--benchmarks", "mme", "--backend", "onnx"), "onnx"),
    ],
    "score": [(("mme", "--data", "{tmp}/eval", "--predictions", "{tmp}/none.jsonl"), REFUSES)],
    "submit": [(("{tmp}/mine", "--output", "{tmp}/up"), RUNS)],
    "compare": [(("{tmp}/a", "{tmp}/b"), RUNS)],
    "info": [(("{model}",), RUNS)],
    "convert": [(("{model}", "{tmp}/native", "--layout", "native"), RUNS)],
    "quantize": [
        (
            (
                "{loud}",
                "--output",
                "{tmp}/q",
                "--calib-data",
                "{tmp}/text.txt",
                "--group-size",
                "32",
                "--num-calib-sequences",
                "1",
            ),
            RUNS,
        )
    ],
    "export": [
        (("{clip}", "--format", "safetensors", "--output", "{tmp}/s"), RUNS),
        (("--list",), RUNS),
    ],
    "serve": [(("{model}",), "serve")],
    "demo": [(("{model}",), "demo"), (("--base-url", "http://127.0.0.1:9"), "demo")],
    "doctor": [((), RUNS)],
    "quickstart": [(("--minutes", "0"), REFUSES)],
    "bench decode": [
        (("--shape", "tiny", "--precision", "bfloat16", "--backend", "torch", *SHORT), RUNS),
        (("--shape", "tiny", "--backend", "onnx", *SHORT), "onnx"),
    ],
    "bench quality": [(("{tmp}/none", "--output", "{tmp}/quality"), REFUSES)],
    "bench serve": [(("http://127.0.0.1:9",), REFUSES), (("{model}",), "serve")],
    "data from-csv": [(("{tmp}/table.csv", "--image-root", "{tmp}", "--output", "{tmp}/table.jsonl"), RUNS)],
    "data check": [(DATA, RUNS)],
    "data inspect": [
        (
            ("{tmp}/data.jsonl", "--format", "messages", "--image-root", "{tmp}", "--model", "{model}", "--index", "0"),
            RUNS,
        )
    ],
    "data stats": [(DATA, RUNS)],
    "data index": [(("{tmp}/data.jsonl",), RUNS)],
    **{
        f"data prepare {name}": [(("{tmp}/none", "--output", "{tmp}/prepared", *more), REFUSES)]
        for name, more in {
            "mmc4": (),
            "coyo": (),
            "flan": (),
            "m3it": (),
            "pkl": ("--kind", "mmc4"),
            "llava-align": ("--images", "{tmp}"),
            "sharegpt4v": ("--image-root", "{tmp}"),
        }.items()
    },
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Directories and files that the arguments name."""
    from tests.quant.models import loud
    from vila.model.loading import save_model

    tmp = tmp_path_factory.mktemp("extras")
    write_training_files(tmp)
    save_recipe(tiny_recipe(tmp), tmp / "recipe.yaml")
    save_model(*loud(layers=2, num_attention_heads=2, num_key_value_heads=1), tmp / "loud")
    (tmp / "text.txt").write_text(TEXT)
    (tmp / "table.csv").write_text("image,question,answer\n0.png,what?,this\n")
    mini = write_mini_datasets(tmp / "eval")
    write_mini_run(mini, tmp / "mine", ("vqav2", "mmbench"))
    written(tmp / "a", range(20)), written(tmp / "b", range(30))
    write_model(tmp / "clip")
    return {"tmp": tmp, "clip": tmp / "clip", "model": tmp / "base", "loud": tmp / "loud", "image": tmp / "0.png"}


def test_the_list_has_every_command():
    every = {words.removeprefix("vila ") for words in usages(get_command(app))}
    groups = {"vila", "data", "data prepare", "bench"}
    assert every - groups == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_without_extras_or_names_the_one_it_needs(command, places, monkeypatch):
    hide_extras(monkeypatch)
    for arguments, outcome in COMMANDS[command]:
        words = [*command.split(), *(word.format(**places) for word in arguments)]
        if outcome == RUNS:
            call_command(words, monkeypatch)
            continue
        with pytest.raises((VilaError, OSError)) as raised:
            call_command(words, monkeypatch)
        if outcome == REFUSES:
            assert not isinstance(raised.value, MissingExtraError)
            continue
        assert isinstance(raised.value, MissingExtraError), raised.value
        wanted = outcome if " " in outcome else f"pip install 'vila-vlm[{outcome}]'"
        assert raised.value.hint == wanted
        assert "\n" not in str(raised.value)


DRIVER = """
import sys
sys.path[:0] = sys.argv[1:3]
from vila.cli.main import main
main(sys.argv[3:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "serve", "demo", "bench serve", "doctor"])
def test_a_real_environment_with_the_base_packages_alone(command, places, base_packages):
    for arguments, outcome in COMMANDS[command]:
        words = [*command.split(), *(word.format(**places) for word in arguments)]
        program = [sys.executable, "-I", "-S", "-c", DRIVER, str(ROOT / "src"), str(base_packages), *words]
        ended = subprocess.run(program, capture_output=True, text=True, check=False)
        assert "Traceback" not in ended.stderr
        assert ended.returncode == (0 if outcome == RUNS else 2), ended.stderr
        assert outcome in (RUNS, REFUSES) or f"pip install 'vila-vlm[{outcome}]'" in ended.stderr


@pytest.fixture(scope="module")
def base_packages(tmp_path_factory):
    """A directory with links to what the base dependencies installed, and nothing else."""
    folder = tmp_path_factory.mktemp("site-packages")
    for name in base_distributions():
        try:
            files = metadata.distribution(name).files or []
        except metadata.PackageNotFoundError:
            continue
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            link = folder / top
            if not link.exists():
                link.symlink_to(metadata.distribution(name).locate_file(top))
    return folder
