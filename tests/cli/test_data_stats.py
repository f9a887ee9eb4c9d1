"""`vila data stats`: counts with and without a tokenizer, and what the licence of a data set forbids."""

import json
from pathlib import Path

import pytest

from tests.cli.printed import words
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.config.load import save_recipe
from vila.prepare.licences import KNOWN, data_licences, licences_of


def write_rows(path: Path, images: list[int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for count in images:
        parts = [{"type": "image", "path": f"{number}.png"} for number in range(count)]
        user = {"role": "user", "content": [*parts, {"type": "text", "text": "why?"}]}
        rows.append({"messages": [user, {"role": "assistant", "content": "so"}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_without_a_model_images_are_counted_and_tokens_are_not(vila, tmp_path):
    file = write_rows(tmp_path / "d.jsonl", [0, 1, 2, 4])
    code, out, err = vila("data", "stats", file)
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if "\u2502 d " in line]
    assert [cell.strip() for cell in line.strip("\u2502").split("\u2502")] == ["d", "4", "7", "-", "-"]
    assert "--model" in words(out)
    facts = json.loads(vila("data", "stats", file, "--json", "--num-samples", 2)[1])["data_sets"][0]
    assert (facts["samples"], facts["tokens"], facts["exact"], facts["surveyed"]) == (4, None, False, 2)
    facts = json.loads(vila("data", "stats", file, "--json", "--num-samples", 0)[1])["data_sets"][0]
    assert (facts["images"], facts["exact"]) == (7, True)


def test_with_a_model_tokens_are_counted_and_shares_add_up(vila, tmp_path):
    recipe = tiny_recipe(write_training_files(tmp_path))
    entry = recipe.data.mixture[0]
    halves = [entry.model_copy(update={"repeat": repeat}) for repeat in (2.0, 0.5)]
    changed = recipe.model_copy(update={"data": recipe.data.model_copy(update={"mixture": tuple(halves)})})
    save_recipe(changed, tmp_path / "recipe.yaml")
    twice, half = json.loads(vila("data", "stats", tmp_path / "recipe.yaml", "--json")[1])["data_sets"]
    assert (twice["name"], half["name"]) == ("data", "data#2")
    assert (twice["samples"], half["samples"]) == (48, 12)
    assert (twice["exact"], half["exact"]) == (True, False)
    assert twice["token_share"] == pytest.approx(0.8, abs=0.001)
    assert twice["tokens"] == pytest.approx(4 * half["tokens"], abs=4)


def test_the_licence_of_a_known_data_set_is_printed_with_its_restrictions(vila, tmp_path):
    code, out, err = vila("data", "stats", write_rows(tmp_path / "sharegpt4v" / "mix_738k.jsonl", [0]))
    assert code == 0, err
    facts = json.loads(vila("data", "stats", tmp_path / "sharegpt4v" / "mix_738k.jsonl", "--json")[1])
    (licence,) = facts["data_sets"][0]["licences"]
    assert licence["name"] == "ShareGPT4V" and licence["checked"] is True
    lines = [line.strip() for line in out.splitlines()]
    assert f"licence: {licence['licence']}" in lines and f"forbids: {licence['forbids']}" in lines


@pytest.mark.parametrize(
    "path, names",
    [
        ("data/LLaVA-Pretrain/LLaVA-CC3M-Pretrain-595K.json", ["LLaVA-CC3M-Pretrain-595K"]),
        ("data/mmc4-core", ["MMC4 and MMC4-core"]),
        ("coyo-25m/part-0001.tar", ["COYO-700M"]),
        ("runs/easy_vqa/data.jsonl", ["easy-VQA"]),
        ("home/flan/work/mine/data.jsonl", []),
        ("flange.jsonl", []),
    ],
)
def test_data_sets_are_known_by_whole_words_of_their_path(path, names):
    assert [one.name for one in licences_of(Path(path))] == names


def test_a_prepared_directory_is_recognised_by_its_index_and_m3it_lists_its_sets(tmp_path):
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions" / "index.json").write_text('{"name": "m3it"}')
    names = [one.name for one in licences_of(tmp_path / "questions")]
    assert names == [one.name for one in data_licences() if one.name.startswith("M3IT")]
    assert "M3IT: gqa" in names
    assert len(licences_of(Path("data/vflan"))) == len(names) + 1


def test_every_known_name_is_that_of_a_licence():
    every = {one.name for one in data_licences()}
    assert {name for names in KNOWN.values() for name in names} <= every
