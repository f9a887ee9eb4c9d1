"""The model card contains the given facts, and marks unknown ones as not known."""

import json
from importlib import resources
from pathlib import Path

import pytest
import yaml

from tests.pages import markdown_rows, numbers
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.cli.train import write_model_card
from vila.config.load import load_recipe, recipe_names, save_recipe
from vila.train.build import build
from vila.train.model_card import base_models, read_front_matter, save_model_card


def card(folder, recipe, **facts):
    save_model_card(folder, recipe, facts)
    text = (folder / "README.md").read_text()
    return text, read_front_matter(text)


def test_front_matter_is_what_the_hub_reads(tmp_path):
    source = "https://huggingface.co/datasets/liuhaotian/LLaVA-CC3M-Pretrain-595K"
    recipe = load_recipe("vila_7b/1_align")
    row = {"name": "CC3M", "source": source, "licence": "other", "forbids": "all | but research"}
    text, front = card(tmp_path, recipe, data_licences={recipe.data.mixture[0].path: [row]})
    assert front["base_model"] == ["lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336"]
    assert front["pipeline_tag"] == "image-text-to-text"
    assert front["datasets"] == ["liuhaotian/LLaVA-CC3M-Pretrain-595K"]
    assert (front["license"], front["library_name"]) == ("other", "vila")
    assert "Llama 2 Community License" in markdown_rows(text)["`lmsys/vicuna-7b-v1.5`"][0]
    data = markdown_rows(text)[f"`{recipe.data.mixture[0].path}`"]
    assert data[1:] == [f"[CC3M]({source})", "other", "all \\| but research"]


@pytest.mark.parametrize(
    ("name", "overrides", "library"),
    [
        ("vila_7b/3_sft_lora", (), "peft"),
        ("vila_7b/3_sft", ("output.layout=llava-hf",), "transformers"),
        ("vila_7b/3_sft", (), "vila"),
    ],
)
def test_the_library_is_the_one_that_loads_the_model(tmp_path, name, overrides, library):
    assert card(tmp_path, load_recipe(name, overrides))[1]["library_name"] == library


def test_unknown_facts_are_marked_as_unknown(tmp_path):
    recipe = load_recipe("vila_7b/1_align", ["model.llm=someone/unheard-of", "model.vision=/nowhere/tower"])
    text, front = card(tmp_path, recipe)
    assert front["base_model"] == ["someone/unheard-of"]
    rows = markdown_rows(text)
    assert rows["`someone/unheard-of`"] == rows["`/nowhere/tower`"] == ["not known", ""]
    assert rows[f"`{recipe.data.mixture[0].path}`"][1:3] == ["", "not known"]
    assert not {"steps", "tokens", "time", "torch"} & rows.keys()


def test_scores_and_progress_are_those_given(tmp_path):
    progress = {"step": 7, "tokens": 12345, "samples": 99, "supervised": 678, "seconds": 90.0, "bad_steps": 2}
    scores = [{"benchmark": "pope", "score": 85.5, "unit": "%", "items": 200}, {"benchmark": "mme", "score": None}]
    text, _ = card(
        tmp_path,
        load_recipe("vila_7b/3_sft"),
        progress=progress,
        scores=scores,
        ranks=8,
        versions={"torch": "2.13"},
        dropped=3,
    )
    rows = markdown_rows(text)
    assert rows["pope"] == ["85.5 %", "200"] and "mme" not in rows
    assert (rows["steps"], rows["supervised tokens"], rows["skipped steps"]) == (["7"], ["678"], ["2"])
    assert numbers(rows["time"][0]) == [1, 30, 8]
    assert rows["samples dropped as too long"] == ["3"]
    assert rows["torch"] == ["2.13"]
    assert "torchrun --nproc-per-node 8 -m vila train recipe.yaml output.dir=runs/reproduced\n" in text


def test_the_recipe_in_the_card_is_the_recipe(tmp_path):
    recipe = load_recipe("vila_1_5_3b/3_sft")
    text, _ = card(tmp_path, recipe)
    (tmp_path / "recipe.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


def test_base_models_are_followed_through_the_stages_before(tmp_path):
    first = load_recipe("vila_7b/1_align", [f"output.dir={tmp_path / 'one'}"])
    second = load_recipe(
        "vila_7b/2_pretrain", [f"model.path={tmp_path / 'one' / 'model'}", f"output.dir={tmp_path / 'two'}"]
    )
    third = load_recipe("vila_7b/3_sft", [f"model.path={tmp_path / 'two' / 'model'}"])
    for recipe in (first, second):
        recipe.output.dir.mkdir()
        save_recipe(recipe, recipe.output.dir / "recipe.yaml")
    assert [base.name for base in base_models(third)] == ["lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336"]
    (tmp_path / "one" / "recipe.yaml").unlink()
    assert [base.name for base in base_models(third)] == [str(tmp_path / "one" / "model")]


def test_copies_on_disk_are_known_by_their_readme_or_their_name(tmp_path):
    named, tower = tmp_path / "vicuna-7b-v1.5", tmp_path / "tower"
    named.mkdir(), tower.mkdir()
    (tower / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# A tower\n")
    llm, vision = base_models(load_recipe("vila_7b/1_align", [f"model.llm={named}", f"model.vision={tower}"]))
    assert (llm.hub, llm.licence) == ("lmsys/vicuna-7b-v1.5", "Llama 2 Community License")
    assert (vision.hub, vision.licence) == ("", "cc-by-4.0")


@pytest.mark.parametrize("text", ["# no front matter", "---\n: [\n---\n", "---\njust text\n---\n", ""])
def test_a_readme_without_facts_is_no_error(text):
    assert read_front_matter(text) == {}


def test_every_part_of_a_packaged_recipe_has_a_known_licence():
    recipes = [load_recipe(name).model for name in recipe_names() if not name.startswith("starter/")]
    named = {name for model in recipes for name in (model.llm, model.vision) if name}
    table = json.loads((resources.files("vila.train") / "model_licences.json").read_text())
    assert named <= table.keys()
    assert all(set(facts) == {"licence", "note"} for facts in table.values())


def test_the_model_card_of_a_run_has_its_results(tmp_path):
    recipe = tiny_recipe(write_training_files(tmp_path), "out", "budget.tokens=300")
    build(recipe).train()
    rows = [{"step": 1, "benchmark": "old", "score": 1.0}, {"step": 2, "benchmark": "easy_vqa", "score": 50.0}]
    finished = json.loads((recipe.output.dir / "finished.json").read_text())
    rows[1]["step"] = finished["progress"]["step"]
    (recipe.output.dir / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_model_card(recipe)
    assert path == recipe.output.dir / "model" / "README.md"
    text = path.read_text()
    table = markdown_rows(text)
    assert table["tokens"] == [f"{finished['progress']['tokens']:,}"]
    assert table["easy_vqa"][0] == "50" and "old" not in table
    assert isinstance(yaml.safe_load(text.split("---\n")[1]), dict) and Path(path).is_file()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory with a converted part in its cache, and a run."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    part = tmp_path / "home" / ".cache" / "vila" / "parts" / "tower"
    part.mkdir(parents=True)
    (part / "part.json").write_text("{}")
    (part / "README.md").write_text("# tower\n\nA tower.\n\nMade from x.whl of https://x (licence: MIT).\n")
    return tmp_path / "home"


def test_a_part_that_the_quickstart_converted_has_the_licence_of_its_readme(home):
    part = home / ".cache" / "vila" / "parts" / "tower"
    llm = "Qwen/Qwen2.5-0.5B"
    bases = base_models(load_recipe("vila_7b/1_align", [f"model.llm={llm}", f"model.vision={part}"]))
    assert [base.licence for base in bases] == ["Apache-2.0", "MIT"]


def test_a_moved_vila_model_keeps_the_licences_of_its_base_models(home):
    part = home / ".cache" / "vila" / "parts" / "tower"
    run = home / "runs" / "one"
    first = load_recipe("vila_7b/1_align", ["model.llm=Qwen/Qwen2.5-0.5B", f"model.vision={part}", f"output.dir={run}"])
    save_model_card(run / "model", first, {})
    (home / "moved").mkdir()
    (run / "model").rename(home / "moved" / "model")
    third = load_recipe("vila_7b/3_sft", [f"model.path={home / 'moved' / 'model'}"])
    assert [base.licence for base in base_models(third)] == ["Apache-2.0", "MIT"]
    assert [base.hub for base in base_models(third)] == ["Qwen/Qwen2.5-0.5B", ""]


def test_no_card_holds_the_home_directory_and_paths_are_relative_to_the_run(home):
    data, run = home / "data" / "mine.jsonl", home / "runs" / "one"
    data.parent.mkdir()
    data.write_text("{}")
    run.mkdir(parents=True)
    part = home / ".cache" / "vila" / "parts" / "tower"
    overrides = [f"model.llm={part}", f"model.vision={part}", f"output.dir={run}"]
    mixture = f"data.mixture=[{{format: messages, path: {data}, image_root: {data.parent}}}]"
    text, _ = card(run / "model", load_recipe("vila_7b/1_align", [*overrides, mixture]))
    assert str(home) not in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["data"]["mixture"][0]["path"] == "../../data/mine.jsonl"
    assert recipe["output"]["dir"] == "."
    assert "`../../data/mine.jsonl`" in markdown_rows(text)


def test_passes_are_those_that_were_made(tmp_path):
    recipe = tiny_recipe(write_training_files(tmp_path), "out", "budget.tokens=300")
    run = build(recipe)
    run.train()
    write_model_card(recipe)
    passes = run.trainer.progress.visits / 24
    rows = markdown_rows((recipe.output.dir / "model" / "README.md").read_text())
    assert rows["passes over the data"] == [f"{passes:.3g}"]
