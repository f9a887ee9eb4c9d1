"""`vila bench quality`: metrics against hand-computed values, resumed results, and the report."""

import json
import math
from dataclasses import replace

import pytest
import torch

from tests.quant.models import loud, random_rows
from tests.starter.tiny_run import write_easy_vqa
from vila.bench.quality import (
    TEXT,
    Task,
    Way,
    block_divergences,
    block_losses,
    compare,
    markdown_table,
    measure_quality,
    quality_task,
    write_quality_report,
)
from vila.cli.main import main
from vila.core.errors import ConfigError
from vila.model.loading import save_model
from vila.quant.calibration import PACKAGED
from vila.quant.quant_config import BEST, QuantConfig
from vila.starter.data import text_sha256

ROWS = random_rows(3)
WAYS = [
    Way("full"),
    Way("rtn", QuantConfig("rtn", group_size=32)),
    Way("awq", QuantConfig(group_size=32), ROWS),
    Way("best", replace(BEST, group_size=32), ROWS),
]
TASK = Task(tuple(row.ids for row in random_rows(4, seed=5).sequences), "0" * 64)


def test_the_loss_of_a_block_is_the_mean_over_its_predicted_tokens():
    model, _ = loud(layers=1)
    ids = random_rows(1, 9).sequences[0].ids
    logs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].detach().double(), -1)
    by_hand = -sum(float(logs[place, ids[place + 1]]) for place in range(8)) / 8
    assert block_losses(model, [ids]) == [pytest.approx(by_hand, rel=1e-5)]


def test_the_divergence_is_zero_from_itself_and_as_by_hand_from_another():
    model, other = loud(layers=1)[0], loud(layers=1, seed=1)[0]
    ids = random_rows(1, 9).sequences[0].ids
    assert block_divergences(model, model, [ids]) == [0]
    own, whole = (
        torch.softmax(one(input_ids=torch.tensor([ids])).logits[0].detach().double(), -1) for one in (model, other)
    )
    by_hand = float((whole * (whole / own).log()).nan_to_num(0).sum(-1).mean())
    assert block_divergences(model, other, [ids]) == [pytest.approx(by_hand, rel=1e-4)]


def row(name, losses, **more):
    return {"asked": {"name": name, "task": {}}, "seconds": 1, "bytes": 10, "losses": losses, "divergences": [], **more}


def test_ways_are_compared_block_by_block_and_question_by_question():
    full = row("full", [1.0, 3.0, 2.0], accuracy=0.75, right={"a": 1, "b": 1, "c": 1, "d": 0})
    rtn = row("rtn", [1.4, 3.4, 2.4], accuracy=0.5, right={"a": 0, "b": 0, "c": 1, "d": 1}, divergences=[0.3, 0.5])
    best = row("best", [1.1, 3.2, 2.0], accuracy=0.75, right={"a": 1, "b": 1, "c": 1, "d": 0}, divergences=[0.1, 0.1])
    first, second, third = compare([full, rtn, best])
    assert (first["difference"], first["removed"]) == (0, None)
    assert first["perplexity"] == pytest.approx(math.exp(2))
    assert second["difference"] == pytest.approx(0.4)
    assert second["standard_error"] == pytest.approx(0, abs=1e-9)
    assert third["difference"] == pytest.approx(0.1)
    assert third["standard_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert third["removed"] == pytest.approx(0.75)
    assert third["divergence_removed"] == pytest.approx(0.75)
    assert (second["accuracy_drop"], second["answers_lost"], second["answers_won"]) == (25, 2, 1)


def test_every_way_is_measured_once_and_shown(tmp_path):
    task = Task(TASK.blocks, TASK.text_sha256, write_easy_vqa(tmp_path / "vqa", train=2, test=2), 5)
    out = tmp_path / "out"
    result = measure_quality(lambda: loud(layers=2), WAYS, task, out)
    ways = {way["name"]: way for way in result["ways"]}
    assert list(ways) == ["full", "rtn", "awq", "best"]
    # Random models predict nothing, so only how far answers moved is certain.
    assert all(ways[name]["difference"] != 0 and ways[name]["bytes"] < ways["full"]["bytes"] for name in list(ways)[1:])
    assert all("accuracy_drop" in way for way in result["ways"])

    def never():
        raise AssertionError("a way was measured again")

    assert measure_quality(never, WAYS, task, out) == result
    assert json.loads((out / "quality.json").read_text()) == result
    write_quality_report(result, {"model": "tiny"}, out / "quality.html")
    page = (out / "quality.html").read_text()
    assert "NLL above full precision" in page
    assert ROWS.sha256 in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    table = markdown_table(result["ways"]).splitlines()
    assert len(table) == 6
    assert len({line.count("|") for line in table}) == 1


def test_figures_of_another_task_are_not_taken_over(tmp_path):
    measure_quality(lambda: loud(layers=1), WAYS[:1], TASK, tmp_path)
    other = Task(TASK.blocks[:2], TASK.text_sha256)
    with pytest.raises(ConfigError) as caught:
        measure_quality(lambda: loud(layers=1), WAYS[:1], other, tmp_path)
    assert (caught.value.file, caught.value.field) == (str(tmp_path / "ways" / "full.json"), "asked")


@pytest.mark.parametrize("ways", [[], WAYS[1:]])
def test_nothing_is_compared_without_full_precision(tmp_path, ways):
    with pytest.raises(ConfigError):
        measure_quality(lambda: loud(layers=1), ways, TASK, tmp_path)


def test_the_text_is_named_by_hash_and_is_not_that_of_calibration():
    processor = loud(layers=1)[1]
    task = quality_task(processor.tokenizer, max_blocks=3)
    assert task.text_sha256 == text_sha256("english_eval.txt")
    assert [len(block) for block in task.blocks] == [512] * 3
    assert TEXT != PACKAGED


def test_the_command_prints_the_table(tmp_path, capsys, monkeypatch):
    save_model(*loud(layers=1), tmp_path / "model")
    flags = [
        "--group-size",
        "32",
        "--methods",
        "full,rtn,awq",
        "--num-eval-sequences",
        "2",
        "--num-calib-sequences",
        "1",
    ]
    with pytest.raises(SystemExit) as ended:
        main(["bench", "quality", str(tmp_path / "model"), "--output", str(tmp_path / "out"), *flags])
    assert ended.value.code == 0
    assert capsys.readouterr().out.count("\n| ") == 3
    for ways, message in (("rtn", "--methods"), ("full,gptq", "'gptq'")):
        with pytest.raises(SystemExit) as ended:
            main(["bench", "quality", str(tmp_path / "model"), "--output", str(tmp_path / "x"), "--methods", ways])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
