"""From a table to a trained model through `vila data`, as docs/own_data.md tells it, and what is said of bad data."""

import json
import re
import textwrap
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.printed import counts, words
from tests.package.readme_blocks import parse_blocks
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.config.load import save_recipe
from vila.core.errors import ConfigError, DataError

PAGE = Path(__file__).parents[2] / "docs" / "own_data.md"


@pytest.fixture
def mine(tmp_path, monkeypatch, model):
    """What the page's Python makes, with a tiny model where the quickstart leaves one."""
    monkeypatch.chdir(tmp_path)
    blocks = parse_blocks(PAGE.read_text(), "own_data.md")
    exec(next(block.code for block in blocks if block.language == "python"), {})
    (tmp_path / "runs" / "starter").mkdir()
    (tmp_path / "runs" / "starter" / "model").symlink_to(model)
    return [block.code for block in blocks if block.language == "bash"]


def commands(text):
    import shlex

    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("vila ")]


def test_the_page_leads_from_a_table_to_an_answer(vila, mine):
    convert, recipe, train = mine
    recipe_text = recipe.split("<<'END'\n")[1].split("END\n")[0]
    Path("runs/mine/recipe.yaml").write_text(
        recipe_text + "compute: {dtype: float32, feature_cache: false, workers: 0}\n"
    )
    told = ""
    for command in [*commands(convert), *commands(recipe), *commands(train)]:
        code, out, err = vila(*command)
        assert code == 0, (command, err)
        told += out + err
    checked = next(line for line in told.splitlines() if line.startswith("data: "))
    assert (counts(checked)["samples"], counts(checked)["distinct"]) == (20, 20)
    assert Path("runs/mine/run/model/model.safetensors").is_file()


def test_check_names_every_kind_of_fault_and_counts_past_what_it_shows(vila, tmp_path):
    answer = {"role": "assistant", "content": "yes"}

    def row(name, *content, reply=answer):
        return {"id": name, "messages": [{"role": "user", "content": list(content)}, reply]}

    (tmp_path / "bad.png").write_bytes(b"\x89PNG broken")
    rows = [
        row("fine", "why?"),
        row("fine", "why?"),
        row("gone", {"type": "image", "path": "none.png"}),
        row("bad", {"type": "image", "path": "bad.png"}),
        row("empty", "why?", reply={"role": "assistant", "content": ""}),
        {"id": "odd"},
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    code, out, _ = vila("data", "check", tmp_path / "d.jsonl", "--max-shown", 3)
    assert code == 1
    assert (counts(out)["samples"], counts(out)["with"], counts(out)["more"]) == (6, 4, 1)
    assert out.count("error: ") == 3
    assert words(out) >= {str(tmp_path / "none.png"), str(tmp_path / "bad.png"), "fine"}
    code, out, _ = vila("data", "check", tmp_path / "d.jsonl", "--json", "--num-samples", 6)
    facts = json.loads(out)["data_sets"][0]
    assert (code, facts["errors"], facts["duplicate_ids"], facts["histogram"]) == (1, 4, 1, {"256": 2})
    assert any("d.jsonl, record 5" in fault for fault in facts["first_errors"])


def test_a_recipe_and_a_file_show_how_they_are_indexed(vila, tmp_path, monkeypatch):
    save_recipe(tiny_recipe(write_training_files(tmp_path)), tmp_path / "recipe.yaml")
    for number, data in enumerate(("recipe.yaml", "data.jsonl")):
        monkeypatch.setenv("VILA_CACHE", str(tmp_path / f"cache{number}"))
        assert words(vila("data", "stats", tmp_path / data)[2]) >= {"index", "data.jsonl"}
        assert "index" not in words(vila("data", "stats", tmp_path / data)[2])


def test_check_of_a_recipe_counts_tokens_and_finds_samples_that_are_too_long(vila, vila_error, tmp_path):
    recipe = tiny_recipe(write_training_files(tmp_path), "out", "data.max_length=24")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    code, out, _ = vila("data", "check", tmp_path / "recipe.yaml")
    assert code == 1
    assert "data.max_length" in words(out)
    error = vila_error("data", "check", tmp_path / "recipe.yaml", "--format", "messages")
    assert (type(error), error.file) == (ConfigError, str(tmp_path / "recipe.yaml"))


def test_from_csv_names_file_and_line_and_writes_nothing(vila_error, tmp_path, image):
    table, out = tmp_path / "t.csv", tmp_path / "t.jsonl"
    table.write_text("image,question,answer\np.png,why?,so\nq.png,why?,so\np.png,,so\n../p.png,a,\np.png,a,b,c\n")
    error = vila_error("data", "from-csv", table, "--image-root", tmp_path, "--output", out)
    assert (type(error), error.file) == (DataError, str(table))
    locations = re.findall(rf"{re.escape(str(table))}, line (\d): (\w+)", error.problem)
    assert locations[:3] == [("3", "image"), ("4", "question"), ("5", "answer")]
    assert [line for line, _ in locations] == ["3", "4", "5", "6"]
    assert not out.exists()
    table.write_text("picture,text\na,b\n")
    error = vila_error("data", "from-csv", table, "--image-root", tmp_path, "--output", out)
    assert (error.exit_code, error.file, error.field, error.value) == (2, str(table), "header", "picture, text")


def test_from_csv_takes_captions_and_refuses_images_outside(vila, tmp_path, image):
    table, out, inside = tmp_path / "t.csv", tmp_path / "t.jsonl", tmp_path / "in"
    inside.mkdir()
    table.write_text("file,caption\np.png,a dot\n")
    assert vila("data", "from-csv", table, "--image-root", tmp_path, "--output", out)[0] == 0
    user, answer = json.loads(out.read_text())["messages"]
    assert user["content"] == [{"type": "image", "path": "p.png"}]
    assert answer["content"] == "a dot"
    table.write_text("file,caption\n../p.png,a dot\n")
    assert vila("data", "from-csv", table, "--image-root", inside, "--output", out)[0] == 1


def test_check_names_missing_images_once_and_faults_with_every_sample(vila, tmp_path, image):
    def row(name, *images):
        parts = [{"type": "image", "path": one} for one in images]
        return {"id": name, "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]}

    rows = [row("1", "p.png", "x.png", "y.png"), row("2", "x.png"), row("3", "p.png", "p.png")]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    code, out, _ = vila("data", "check", tmp_path / "d.jsonl")
    assert code == 1
    assert (counts(out)["samples"], counts(out)["with"], counts(out)["distinct"]) == (3, 2, 3)
    assert out.count("error: sample '1': ") == out.count("error: sample '2': ") == 1
    listed = out.split("missing files: 2\n")[1].splitlines()[:2]
    assert [Path(line.strip()).name for line in listed] == ["x.png", "y.png"]
    code, out, _ = vila("data", "check", tmp_path / "d.jsonl", "--json", "--max-shown", 1)
    facts = json.loads(out)["data_sets"][0]
    assert (facts["missing_files"], len(facts["first_missing_files"])) == (2, 1)
    assert (facts["errors"], facts["images"], facts["width"]) == (2, 3, [28, 28, 28])


def test_check_opens_videos_and_names_missing_ones(vila, tmp_path):
    def row(name):
        parts = [{"type": "video", "path": name}]
        return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]}

    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 90, 200)]
    frames[0].save(tmp_path / "good.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "bad.mp4").write_bytes(b"no clip")
    rows = [row(name) for name in ("good.gif", "bad.mp4", "gone.mp4")]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    code, out, _ = vila("data", "check", tmp_path / "d.jsonl", "--json")
    facts = json.loads(out)["data_sets"][0]
    assert (code, facts["errors"], facts["images"], facts["videos"], facts["missing_files"]) == (1, 2, 0, 3, 1)
    assert facts["first_missing_files"] == [str(tmp_path / "gone.mp4")]


def test_index_reports_its_path_and_whether_it_existed(vila, tmp_path, monkeypatch):
    monkeypatch.setenv("VILA_CACHE", str(tmp_path / "cache"))
    shards = tmp_path / "shards"
    shards.mkdir()
    record = '{"messages": []}\n'
    for name in "ab":
        (shards / f"{name}.jsonl").write_text(record * 2)
    code, out, err = vila("data", "index", shards / "a.jsonl")
    (file,) = (tmp_path / "cache" / "index").iterdir()
    assert code == 0, err
    assert words(out) >= {str(shards / "a.jsonl"), str(file)}
    assert words(err) >= {"index", "a.jsonl"}
    assert counts(out) == {"records": 2, "built": 1, "found": 0}
    assert counts(vila("data", "index", shards)[1]) == {"records": 4, "built": 1, "found": 1}
    assert counts(vila("data", "index", f"{shards}/*.jsonl")[1]) == {"records": 4, "built": 0, "found": 2}
    (shards / "a.jsonl").write_text(record)
    assert counts(vila("data", "index", shards / "a.jsonl")[1]) == {"records": 1, "built": 1, "found": 0}


def test_options_reach_the_format_and_wrong_ones_are_named(vila, vila_error, tmp_path):
    document = {"text_list": ["A."], "image_info": [], "similarity_matrix": []}
    (tmp_path / "d.jsonl").write_text(json.dumps(document) + "\n")
    command = ("data", "index", tmp_path / "d.jsonl", "--format", "mmc4")
    assert counts(vila(*command)[1])["records"] == 1
    assert counts(vila(*command, "--format-option", "without_images=drop")[1])["records"] == 0
    error = vila_error(*command, "--format-option", "max_images")
    assert (error.exit_code, error.field, error.value) == (2, "--format-option", "max_images")
    error = vila_error("data", "check", "starter/1_align", "--format-option", "a=1")
    assert (type(error), error.file) == (ConfigError, "starter/1_align")


def test_inspect_shows_supervised_text_and_writes_one_page(vila, tmp_path):
    recipe = tiny_recipe(write_training_files(tmp_path))
    save_recipe(recipe, tmp_path / "recipe.yaml")
    code, out, err = vila("data", "inspect", tmp_path / "recipe.yaml", "--index", 1, "--html", tmp_path / "o.html")
    assert code == 0, err
    assert out.count("<image x 4>") == 1
    supervised = [piece.split("\u00bb")[0].strip() for piece in out.split("\u00ab")[1:]]
    assert any("abab" in piece for piece in supervised)
    assert not any("q1?" in piece for piece in supervised)
    page = (tmp_path / "o.html").read_text()
    assert page.count("data:image/png;base64,") >= 1
    assert page.replace("http://www.w3.org", "").count("http://") == 0
    code, _, _ = vila("data", "inspect", tmp_path / "recipe.yaml", "--index", 99)
    assert (code, vila.error.field, vila.error.value) == (2, "--index", 99)
    assert counts(vila.error.problem)["samples"] == 24


def test_check_counts_media_that_a_format_does_not_read(vila, tmp_path, image):
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a dot"}]
    rows = [{"image": "p.png", "images": ["p.png"], "conversations": turns}, {"image": "p.png", "conversations": turns}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    code, out, _ = vila("data", "check", tmp_path / "d.jsonl", "--format", "llava_json")
    assert code == 0 and "images (1)" in out
    facts = json.loads(vila("data", "check", tmp_path / "d.jsonl", "--format", "llava_json", "--json")[1])
    assert facts["data_sets"][0]["unread_media"] == {"images": 1}


def run_printed(vila, out):
    """Run the commands that `from-csv` printed, and return what they wrote."""
    printed = out.partition("next:\n")[2]
    texts = []
    for command in commands(textwrap.dedent(printed)):
        code, text, err = vila(*command)
        assert code == 0, (command, text, err)
        texts.append(text + err)
    return texts


def images_in(folder):
    folder.mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (64, 48), ("red", "blue")[number % 2]).save(folder / f"{number} a.png")
    rows = "".join(f"{number} a.png,what color is it?,{('red', 'blue')[number % 2]}\n" for number in range(4))
    (folder.parent / "table.csv").write_text(f"image,question,answer\n{rows}")
    return folder.parent / "table.csv"


def test_what_from_csv_prints_runs_as_it_is_printed(vila, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    table = images_in(tmp_path / "my data" / "pictures")
    (tmp_path / "runs" / "starter").mkdir(parents=True)
    (tmp_path / "runs" / "starter" / "model").symlink_to(model)
    code, out, err = vila(
        "data", "from-csv", table, "--image-root", "my data/pictures", "--output", "my data/mine.jsonl"
    )
    assert code == 0, err
    check, _, answer = run_printed(vila, out)
    assert (counts(check)["samples"], counts(check)["distinct"]) == (4, 4)
    assert Path("my data/mine_run/model/model.safetensors").is_file() and answer


def test_from_csv_links_images_that_are_not_below_its_output(vila, tmp_path):
    table = images_in(tmp_path / "photos" / "all")
    out = tmp_path / "elsewhere" / "mine.jsonl"
    for _ in range(2):
        code, text, err = vila("data", "from-csv", table, "--image-root", tmp_path / "photos" / "all", "--output", out)
        assert code == 0, err
    linked = out.parent / "mine_images"
    assert str(linked) in text
    assert (linked / "0 a.png").samefile(tmp_path / "photos" / "all" / "0 a.png")
    code, text, _ = vila("data", "check", out)
    assert (code, "4 samples, no errors, 4 distinct images" in text) == (0, True)


def test_without_the_starter_its_making_is_one_of_the_next_commands(vila, tmp_path, monkeypatch, image):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("file,caption\np.png,a dot\n")
    _, out, _ = vila("data", "from-csv", "t.csv", "--image-root", ".", "--output", "t.jsonl")
    check, quickstart, train, ask = commands(textwrap.dedent(out.partition("next:\n")[2]))
    assert (check, quickstart) == (["data", "check", "t.jsonl"], ["quickstart"])
    assert train[0] == "train" and ask[-2:] == ["--prompt", ""]
    assert vila(*check)[0] == 0


def test_check_of_a_recipe_reports_image_sizes_and_overlong_samples(vila, tmp_path):
    folder = write_training_files(tmp_path)
    for number in range(4):
        Image.new("RGB", (1024, 256)).save(folder / f"{number}.png")
    for overlong in ("drop", "truncate", "error"):
        recipe = tiny_recipe(folder, "out", "data.max_length=12", f"data.overlong={overlong}")
        save_recipe(recipe, tmp_path / "recipe.yaml")
        (tmp_path / "own.yaml").write_text("extends: recipe.yaml\nseed: 1\n")
        code, out, _ = vila("data", "check", tmp_path / "own.yaml", "--json")
        facts = json.loads(out)["data_sets"][0]
        assert code == (overlong == "error")
        rows = facts["rows"]
        assert rows["origin"] == "recipe.yaml"
        assert (rows["overlong"], rows["count"], rows["longer"], rows["longest"]) == (overlong, 24, 19, 28)
        # Of three samples in which a branch fits, truncation keeps the beginning.
        assert rows["left_out"] == {"drop": 19, "truncate": 16, "error": 0}[overlong]
    assert facts["tower"]["image_size"] == 28
    assert facts["tower"]["strongly_changed"] == 3  # of 0, 1, 3.png: 2 is text alone


def test_check_saves_images_as_the_tower_sees_them(vila, tmp_path, model):
    from vila.core.vision_spec import VisionSpec
    from vila.media.transform import square_bytes

    table = images_in(tmp_path / "in")
    vila("data", "from-csv", table, "--image-root", tmp_path / "in", "--output", tmp_path / "mine.jsonl")
    views = tmp_path / "views"
    code, out, err = vila("data", "check", tmp_path / "mine.jsonl", "--model", model, "--save-images", views)
    assert code == 0, err
    files = sorted(views.iterdir())
    assert len(files) == 4 and str(views) in out
    spec = VisionSpec(28, 4, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "pad")
    spec = VisionSpec.from_dict({**spec.to_dict(), **json.loads((model / "config.json").read_text())["vision_spec"]})
    seen = {Image.open(file).tobytes() for file in files}
    made = [square_bytes(Image.open(tmp_path / "in" / f"{n} a.png"), spec) for n in range(4)]
    assert seen == {Image.fromarray(one.transpose(1, 2, 0)).tobytes() for one in made}
    assert vila("data", "check", tmp_path / "mine.jsonl", "--save-images", views)[0] == 2
    assert "--model" in words(vila.error.hint)


def test_train_reports_image_sizes_overlong_samples_and_ignored_fields(vila, tmp_path):
    folder = write_training_files(tmp_path)
    Image.new("RGB", (560, 280)).save(folder / "0.png")
    lines = (folder / "data.jsonl").read_text().splitlines()
    rows = [{**json.loads(line), "image_path": "0.png"} if "image" in line else json.loads(line) for line in lines]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tiny_recipe(folder, "out", "data.max_length=20", "data.overlong=drop", "budget.tokens=40")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    code, _, err = vila("train", tmp_path / "recipe.yaml")
    assert code == 0, err
    said = " ".join(err.split())
    assert said.count("28 x 28") >= 1
    assert words(said) >= {"data.max_length=20", str(tmp_path / "recipe.yaml"), "image_path"}


@pytest.mark.parametrize("tune", ["[projector]", "[vision]", "[vision,projector]"])
def test_a_stage_that_trains_on_images_alone_is_refused_without_any(vila, tmp_path, tune):
    folder = write_training_files(tmp_path)
    said = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]
    (folder / "data.jsonl").write_text(f"{json.dumps({'messages': said})}\n" * 30)
    recipe = tiny_recipe(folder, "out", f"stage.tune={tune}", "stage.llm_parts=[]")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    for command in (("data", "check"), ("train",), ("train", "--dry-run")):
        code, _, err = vila(*command, tmp_path / "recipe.yaml")
        assert code == 2, (command, err)
        assert {name for name in ("data.mixture", "stage.tune") if name in err} == {"data.mixture", "stage.tune"}
    assert not (tmp_path / "out" / "model").exists()
    assert vila("train", tmp_path / "recipe.yaml", "--dry-run", "stage.tune=[projector,llm]")[0] == 0
