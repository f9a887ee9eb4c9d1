"""The report of a run shows the content of its files, in bounded size for any length."""

import json
import math
import random
import re
from itertools import pairwise

import pytest
import torch

from tests import tiny
from tests.pages import HtmlPage, numbers
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.config.load import load_recipe, save_recipe
from vila.core.errors import DataError
from vila.train import report
from vila.train.build import build
from vila.train.report import RunReport, write_report
from vila.train.report_data import Curve, StepCurves, ThinnedRecords


def step(number, **facts):
    return {
        "step": number,
        "tokens_seen": 100 * number,
        "loss": 1 + math.exp(-number / 50),
        "loss_by_data_set": {"pages": 2.0, "pairs": 1.0},
        "lr": 1e-4,
        "grad_norm": 1.0,
        "tokens": 100,
        "supervised": 40,
        "fill": 0.9,
        "images": 2,
        "tokens_by_data_set": {"pages": 75, "pairs": 25},
        "dropped": 0,
        "truncated": 0,
        "faults": 0,
        "tokens_per_second": 50.0,
        "seconds": 2.0 * number,
        **facts,
    }


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """A run of a hundred steps with everything that a run can leave."""
    write_rows(tmp_path / "metrics.jsonl", [step(n, dropped=n == 5, faults=n == 6) for n in range(1, 101)])
    image = tmp_path / "p.png"
    image.write_bytes(tiny.image(1).source)
    asked = [("what <b>is</b> it?", str(image)), ("who?", ""), ("gone?", str(tmp_path / "no.png"))]
    write_rows(
        tmp_path / "answers.jsonl",
        [{"step": s, "prompt": p, "image": i, "answer": f"answer {s}"} for s in (50, 100) for p, i in asked],
    )
    scores = [(50, 40.0), (75, 60.0), (100, 55.0)]
    write_rows(
        tmp_path / "evaluations.jsonl",
        [{"step": s, "benchmark": "pope", "score": v, "unit": "%", "items": 9, "seconds": 3.0} for s, v in scores],
    )
    write_rows(tmp_path / "faults.jsonl", [{"position": n, "reason": f"row {n}: broken"} for n in range(30)])
    write_rows(
        tmp_path / "bad_steps.jsonl",
        [{"step": 7, "loss": "nan", "grad_norm": "inf", "ids": [f"id{n}" for n in range(8)]}],
    )
    (tmp_path / "shares.json").write_text('{"pages": 60, "pairs": 40}')
    (tmp_path / "finished.json").write_text('{"versions": {"torch": "2.13"}, "ranks": 4}')
    save_recipe(load_recipe("vila_7b/3_sft"), tmp_path / "recipe.yaml")
    return tmp_path


def test_all_outputs_of_a_run_are_on_the_page(folder):
    page = HtmlPage(write_report(folder))
    assert numbers(page.subtitle) == [100]
    assert page.figures["tokens"][0] == "10,000" and numbers(page.figures["tokens"][1]) == [200]
    assert page.figures["tokens per second"][0] == "50"
    assert page.figures["pope"][0] == "60.0 %" and numbers(page.figures["pope"][1]) == [3, 75]
    assert page.rows["pope"] == ["100", "55.0 %", "9", "3 s"]
    assert page.rows["pages"] == ["7,500", "75.0 %", "60.0 %", "2"]
    assert page.rows["dropped as too long"] == page.rows["not readable"] == ["1"]
    assert page.rows["supervised tokens"] == ["4,000 (40.0 %)"]
    assert page.rows["50"] == ["answer 50"]
    assert [card[:2] for card in page.cards] == [
        [question, "answer 100"] for question in ("what <b>is</b> it?", "who?", "gone?")
    ]
    assert str(folder / "no.png") in page.cards[2][2]
    assert [page.rows[str(n)] for n in range(10) if n != 7] == [[f"row {n}: broken"] for n in range(10) if n != 7]
    assert "10" not in page.rows
    assert [10, 30] in [numbers(caption) for caption in page.captions]
    assert (page.rows["torch"], page.rows["processes"]) == (["2.13"], ["4"])
    html = (folder / "report.html").read_text()
    assert "vila_7b_3_sft" in html and "max_length: 4096" in html
    assert "id0, id1, id2, id3, id4" in html
    assert [uri.partition(";")[0] for uri in page.images] == ["data:image/png"]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", re.sub(r"<pre>.*?</pre>", "", html, flags=re.S))


def test_the_page_differs_for_finished_and_running_runs(folder):
    finished = HtmlPage(write_report(folder)).subtitle
    (folder / "finished.json").unlink()
    running = HtmlPage(write_report(folder)).subtitle
    assert finished != running
    assert numbers(finished) == numbers(running) == [100]


@pytest.mark.parametrize(
    ("names", "section"),
    [(["answers"], "answers"), (["evaluations"], "evaluation"), (["faults", "bad_steps"], "skipped")],
)
def test_a_missing_file_leaves_its_section_out(folder, names, section):
    sections = HtmlPage(write_report(folder)).sections
    for name in names:
        (folder / f"{name}.jsonl").unlink()
    assert HtmlPage(write_report(folder)).sections == [one for one in sections if one != section]


def test_a_folder_without_a_step_has_a_page(tmp_path):
    page = HtmlPage(write_report(tmp_path))
    assert page.figures == {} and page.sections == []


def test_utilisation_and_memory_are_shown_where_they_are_known(folder):
    before = HtmlPage(write_report(folder))
    write_rows(folder / "metrics.jsonl", [step(n, mfu=0.42, memory_gib=3.0) for n in range(1, 4)])
    after = HtmlPage(write_report(folder))
    assert "MFU" not in before.figures and after.figures["MFU"][0] == "42.0 %"
    assert len(set(after.plots) - set(before.plots)) == 2  # utilisation and memory


def test_a_long_run_is_a_small_page_that_keeps_the_spike(tmp_path):
    rng = random.Random(0)
    names = [f"data set {number}" for number in range(20)]
    rows = (
        step(
            n,
            loss=99.0 if n == 6543 else 1 + rng.random(),
            loss_by_data_set={name: rng.random() for name in names},
            tokens_by_data_set=dict.fromkeys(names, 5),
        )
        for n in range(1, 8001)
    )
    write_rows(tmp_path / "metrics.jsonl", rows)
    path = write_report(tmp_path)
    assert path.stat().st_size < 2_000_000  # 1.0 MB, which longer runs do not change
    steps = StepCurves(tmp_path / "metrics.jsonl")
    steps.read()
    assert (6543, 99.0) in steps.curves["loss"].extremes
    assert len(steps.curves["loss"].means) <= 500
    assert [12, 8] in [numbers(caption) for caption in HtmlPage(path).captions]


def test_a_report_that_is_written_again_reads_only_what_is_new(folder):
    report = RunReport(folder)
    report.write()
    metrics = folder / "metrics.jsonl"
    with metrics.open("a") as stream:
        stream.write(json.dumps(step(101)) + "\n" + '{"step": 102, "lo')
    report.write()
    with metrics.open("a") as stream:
        stream.write('ss": 5.0}\n')
    report.write()
    assert report._steps.last == {"step": 102, "loss": 5.0}
    fresh = StepCurves(metrics)
    fresh.read()
    assert fresh.curves["loss"].means == report._steps.curves["loss"].means
    assert fresh.totals == report._steps.totals


def test_a_report_of_a_run_that_went_back_begins_anew(folder):
    report = RunReport(folder)
    report.write()
    write_rows(folder / "metrics.jsonl", [step(n, loss=3.0) for n in range(1, 200)])
    report.write()
    assert {y for _, y in report._steps.curves["loss"].means} == {3.0}
    assert report._steps.totals["tokens"] == 199 * 100


def test_a_line_that_is_no_json_is_named(folder):
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write("{oops}\n")
    with pytest.raises(DataError) as caught:
        write_report(folder)
    assert (caught.value.file, caught.value.record) == (str(folder / "metrics.jsonl"), "line 101")


def test_losses_that_are_not_finite_do_not_break_the_page(folder):
    write_rows(folder / "metrics.jsonl", [step(n, loss=float("nan"), grad_norm=float("inf")) for n in range(1, 5)])
    write_report(folder)


def test_a_curve_keeps_means_and_extremes():
    rng = random.Random(1)
    points = [(float(x), rng.random()) for x in range(10_001)]
    points[777] = (777.0, 50.0)
    points[4000] = (4000.0, -50.0)
    curve = Curve(limit=101)
    for x, y in points:
        curve.add(x, y)
    curve.add(10_001, float("nan"))
    assert len(curve.means) <= 101 and len(curve) == 10_001 and curve.lost == 1
    assert {(777.0, 50.0), (4000.0, -50.0)} <= set(curve.extremes)
    assert curve.extremes == sorted(curve.extremes)
    # All stretches but the last are of one size, so their means make the mean of all they hold.
    size = round(10_001 / len(curve.means) + 0.5)
    assert size & (size - 1) == 0 or len(curve.means) > 10_001 // (2 * size)
    first = sum(y for _, y in points[:128]) / 128
    assert curve.means[0] == pytest.approx((63.5, first))


def test_a_short_curve_is_its_points():
    curve = Curve()
    points = [(float(x), float(x * x)) for x in range(500)]
    for x, y in points:
        curve.add(x, y)
    assert curve.means == curve.extremes == points


def test_sampled_rows_hold_the_first_the_newest_and_an_even_choice():
    sampled = ThinnedRecords()
    for number in range(1000):
        sampled.add({"step": number} | ({"score": 9} if number in (501, 700) else {"score": None}))
    steps = [row["step"] for row in sampled.shown]
    assert sampled.best == {"step": 501, "score": 9}
    assert steps[0] == 0 and steps[-1] == 999 and 20 <= len(steps) <= 42
    assert len({later - earlier for earlier, later in pairwise(steps[:-1])}) == 1


def test_a_real_run_has_a_report(tmp_path):
    recipe = tiny_recipe(write_training_files(tmp_path), "out", "budget.tokens=600")
    build(recipe).train()
    page = HtmlPage(write_report(recipe.output.dir))
    last = json.loads((recipe.output.dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert numbers(page.subtitle) == [last["step"]]
    assert numbers(page.figures["tokens"][0]) == [last["tokens_seen"]]
    assert page.rows["torch"] == [torch.__version__]


def test_a_checkpoint_that_is_deleted_while_the_report_is_written_is_passed_over(folder, monkeypatch):
    """Its thread deletes old checkpoints while the loop writes the report."""
    for step in (1, 2):
        place = folder / "checkpoint" / f"step-{step:08d}"
        place.mkdir(parents=True)
        (place / "state.json").write_text(json.dumps({"versions": {"torch": f"version {step}"}, "world": 1}))
    of_file = report.Fields.of_file

    def delete_first(path, *arguments):
        if "step-00000002" in str(path):
            path.unlink()
        return of_file(path, *arguments)

    (folder / "finished.json").unlink(missing_ok=True)
    monkeypatch.setattr(report.Fields, "of_file", staticmethod(delete_first))
    assert HtmlPage(write_report(folder)).rows["torch"] == ["version 1"]


def test_the_report_holds_no_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run, data = tmp_path / "runs" / "one", tmp_path / "data.jsonl"
    run.mkdir(parents=True)
    data.touch()
    save_recipe(load_recipe("starter/3_sft", [f"data.mixture.0.path={data}", f"output.dir={run}"]), run / "recipe.yaml")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (run / "faults.jsonl").write_text(json.dumps({"position": 1, "reason": f"{data}, record 2: no image"}) + "\n")
    (run / "answers.jsonl").write_text(
        json.dumps({"step": 1, "prompt": "?", "image": "../a.png", "answer": "x"}) + "\n"
    )
    text = write_report(run).read_text()
    assert str(tmp_path) not in text
    assert "../../data.jsonl" in text
