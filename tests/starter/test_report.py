"""The quickstart's report: complete files, the given numbers, and no section without data."""

import math
import re
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from tests.pages import numbers
from vila.core.errors import MediaError
from vila.core.reading import read_json
from vila.report.plots import line_plot
from vila.starter import report
from vila.starter.report import plain, render_report, write_report

SECTIONS = {
    "accuracy_by_type": "Accuracy",
    "examples": "Answers",
    "few_shot": "Few-shot prompt",
    "perplexity": "Language",
    "commands": "Next steps",
}


@pytest.fixture
def result(tmp_path):
    path = (tmp_path / "shape.png").as_posix()
    Image.new("RGB", (64, 64), "teal").save(path)
    stage = {"title": None, "tune": ["projector"], "tokens": 4000, "steps": 2, "seconds": 61.0}
    return {
        "accuracy": 0.9713,
        "accuracy_by_type": {"what <b>shape</b>": {"accuracy": 0.9, "majority": 0.3, "blind": 0.4, "count": 1200}},
        "majority_accuracy": 0.3733,
        "blind_accuracy": 0.67,
        "swapped_accuracy": 0.45,
        "questions": 9673,
        "seconds": {"parts": 21.0, "stage 1": 61.0},
        "tokens_per_second": {"align": 652.4, "sft": 312.0},
        "machine": {"cpu": "Example CPU", "cores": 2, "memory_gib": 23.5, "torch": "2.13", "date": "2026-01-31"},
        "stages": [
            {**stage, "name": "align", "title": "1 Align", "loss": [[2000, 8.0], [4000, 2.0]],
             "caption_nll": {"right": 1.02, "swapped": 1.94}},
            {**stage, "name": "sft", "loss": [[2000, 1.5], [3000, None], [4000, 0.1]], "caption_nll": None},
        ],
        "perplexity": {"text_sha256": "ab" * 32, "tokens": 4096, "before": 14.82, "after": 17.05,
                       "rise_percent": 15.05},
        "examples": [
            {"image": path, "question": "what shape?", "answer": "Circle ", "truth": "circle"},
            {"image": path, "question": "what <colour>?", "answer": "</s><script>", "truth": "teal"},
        ],
        "few_shot": {"images": [path, path], "prompt": "<image>\nred circle\n<image>\n",
                     "answer": "teal", "truth": "teal"},
        "validation_accuracy": 0.9742,
        "seed": 7,
        "commands": {"Ask it": "vila ask runs/starter image.png"},
    }  # fmt: skip


def texts(html):
    return re.findall(r"<p[^>]*>(.*?)</p>", html)


def headings(html):
    return re.findall(r"<h2[^>]*>(.*?)</h2>", html)


def test_report_shows_every_section_and_the_numbers(result, tmp_path):
    write_report(result, tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert headings(html) == [
        "Accuracy", "Answers", "Few-shot prompt", "Training", "Use of the image", "Language", "Time and machine",
        "Next steps",
    ]  # fmt: skip
    for shown in (
        "97.1\xa0%",
        "67.0\xa0%",
        "45.0\xa0%",
        "97.4\xa0%",
        "1\xa0min 22\xa0s",
        "9,673",
        "1.94",
        "14.82",
        "+15.1",
    ):
        assert shown in html, shown
    assert 30.1 in [n for text in texts(html) for n in numbers(text)]
    assert html.count('class="card good"') == 1 and html.count('class="card bad"') == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "report.json"]


def test_json_holds_the_same_result(result, tmp_path):
    write_report(result, tmp_path)
    back = read_json(tmp_path / "report.json")
    assert back == plain(result)
    assert back["accuracy_by_type"] == result["accuracy_by_type"]
    assert back["examples"][0]["image"] == (tmp_path / "shape.png").as_posix()
    assert headings(render_report(back).render()) == headings(render_report(result).render())


def test_numbers_of_the_json_that_are_not_finite_are_null(result, tmp_path):
    result["stages"][0]["loss"][0][1] = math.nan
    write_report(result, tmp_path)
    assert read_json(tmp_path / "report.json")["stages"][0]["loss"][0] == [2000, None]


def test_text_of_the_model_is_escaped_and_plots_are_valid_xml(result):
    html = render_report(result).render()
    assert "<script" not in html and "&lt;/s&gt;&lt;script&gt;" in html and "what &lt;b&gt;shape" in html
    plots = re.findall(r"<svg.*?</svg>", html, re.S)
    assert len(plots) == 2  # training loss, for wide and narrow screens
    for plot in plots:
        ET.fromstring(plot)


def test_nothing_is_loaded_from_the_network(result):
    html = render_report(result).render()
    assert re.findall(r'(?:src|href)="(?!#|data:)|url\((?!#)|@import', html) == []
    assert set(re.findall(r'https?://[^"]*', html)) == {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("key", SECTIONS)
@pytest.mark.parametrize("absent", ["deleted", "none"])
def test_a_missing_key_omits_its_section(result, key, absent):
    everything = headings(render_report(result).render())
    if absent == "deleted":
        del result[key]
    else:
        result[key] = None
    assert headings(render_report(result).render()) == [title for title in everything if title != SECTIONS[key]]


def test_any_single_key_may_be_missing_and_an_empty_result_still_renders(result):
    for key in result:
        render_report({k: v for k, v in result.items() if k != key}).render()
        render_report({key: result[key]}).render()
    assert headings(render_report({}).render()) == []


def test_token_counts_that_restart_with_each_stage_are_concatenated(result, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        report, "line_plot", lambda series, **options: drawn.extend(series) or line_plot(series, **options)
    )
    render_report(result)
    assert [[x for x, _ in one.points] for one in drawn] == [[2000, 4000], [6000, 7000, 8000]]


def test_a_report_that_fails_leaves_the_old_one_untouched(result, tmp_path):
    write_report(result, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("report.*")}
    result["examples"][1]["image"] = str(tmp_path / "gone.png")
    with pytest.raises(MediaError) as caught:
        write_report(result, tmp_path)
    assert caught.value.file == str(tmp_path / "gone.png")
    assert {p.name: p.read_bytes() for p in tmp_path.glob("report.*")} == before
    assert list(tmp_path.glob(".*")) == []


def test_a_model_below_the_blind_baseline_is_reported(result):
    html = render_report({**result, "accuracy": 0.6, "swapped_accuracy": 0.61}).render()
    assert 7.0 in [n for text in texts(html) for n in numbers(text)] and "61.0\xa0%" in html
