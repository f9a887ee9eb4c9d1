"""The report of a run and the comparison of two runs."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.eval.mini_datasets import Answers, truly, write_mini_datasets, write_mini_run
from tests.pages import HtmlPage, markdown_rows, numbers
from vila.core.errors import DataError
from vila.core.files import write_json, write_jsonl
from vila.core.reading import read_json
from vila.core.types import Image as CoreImage
from vila.core.types import Message
from vila.eval.benchmark import BENCHMARKS, Item, QuestionScore
from vila.eval.few_shot import few_shot
from vila.eval.predictions import read_question_scores, write_question_scores
from vila.eval.published import published_table
from vila.eval.report import compare_runs, write_report
from vila.eval.report_data import load_samples, sample_scores, shorten
from vila.eval.runner import run_benchmark
from vila.report.html import embed
from vila.report.numbers import MISSING

FAILS = ("0000000000000001/what color is it?", "0000000000000002/what color is it?")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_mini_datasets(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of all ten benchmarks, a third of the answers "no", two failed questions of TextVQA; its three reports."""
    out = tmp_path_factory.mktemp("run") / "mine"
    write_mini_run(data, out, answer=lambda n, item: truly(n, item) if n % 3 else "no", fails=set(FAILS))
    return out, *[path.read_text() for path in write_report(out)]


def fake_run(folder, question_scores, name="easy_vqa", protocol="upstream", scores=None, facts=None):
    """A run folder with these question scores and the other files that a report reads."""
    mean = 100 * sum(score["value"] for score in question_scores) / len(question_scores) if question_scores else None
    own = {"benchmark": name, "rules": protocol, "score": mean, "unit": "%", "interval": None, "notes": []}
    write_json(folder / name / "scores.json", {**own, **(scores or {})})
    write_jsonl(folder / name / "question_scores.jsonl", question_scores)
    write_jsonl(
        folder / name / "predictions.jsonl", [{"id": m["id"], "prompt": "what?", "text": "x"} for m in question_scores]
    )
    before = read_json(folder / "eval.json")["benchmarks"] if (folder / "eval.json").is_file() else {}
    write_json(folder / "eval.json", {"model": "m", "data": "", **(facts or {}), "benchmarks": {**before, name: name}})
    return folder


def score_record(number, value, **fields):
    return {"id": f"q{number}", "value": value, "group": f"p{number}", "answer": "a", "truth": "t", **fields}


def row_of(markdown, title):
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_published_scores():
    table = published_table()
    rows = {model: [each.scores[model] for each in table.benchmarks.values()] for model in table.models}
    assert list(table.benchmarks) == (
        ["vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mmbench", "mmbench_cn", "seed"]
    )
    assert rows == {
        "VILA-7B": [80.3, 63.1, 59.6, 68.0, 62.6, 86.3, 1489.38, 69.8, 61.0, 61.7],
        "VILA-7B INT4": [80.1, 63.0, 57.8, 68.0, 61.9, 85.3, 1486.25, 68.8, 59.0, 61.3],
        "VILA-13B": [80.5, 63.6, 63.1, 70.5, 64.0, 86.3, 1553.6, 73.8, 66.7, 62.8],
        "VILA-13B INT4": [80.4, 63.6, 63.0, 71.2, 63.5, 86.98, 1552.9, 73.6, 66.3, 62.2],
    }  # fmt: skip


def test_table_has_score_interval_and_published_scores(whole):
    _, _, markdown, _ = whole
    # Nine questions about three images, the first one about each is answered "no": two of three right in each.
    assert row_of(markdown, "GQA") == ["GQA", "66.67", "66.7 to 66.7", "63.1", "63.0", "63.6", "63.6"]
    assert row_of(markdown, "VQAv2")[:4] == ["VQAv2", MISSING, "not scored here", "80.3"]
    assert len([cell for cell in row_of(markdown, "benchmark") if "VILA-13B INT4" in cell]) == 1
    caveats = json.loads(whole[3])["before_comparing"]
    assert {9, 12_578} <= set(numbers(caveats["GQA"]))
    assert published_table().benchmarks["mmbench"].difference in caveats["MMBench"]


def test_interval_of_another_mean_is_labelled(tmp_path):
    sure = {"mean": 80.0, "low": 70.0, "high": 90.0, "questions": 1, "groups": 1}
    fake_run(tmp_path, [score_record(1, 1.0)], "gqa", scores={"score": 60.0, "interval": sure})
    _, markdown, text = (path.read_text() for path in write_report(tmp_path))
    assert row_of(markdown, "GQA")[2] == "70.0 to 90.0 (mean question score 80.0 %)"
    assert json.loads(text)["benchmarks"]["gqa"]["interval_is_of_score"] is False


@pytest.mark.parametrize("name", ["mme", "pope"])
def test_points_and_f1_have_intervals_of_their_own(whole, name):
    found = json.loads(whole[3])["benchmarks"][name]
    assert found["interval_is_of_score"] is True
    assert found["interval"]["low"] <= found["score"] <= found["interval"]["high"]


def test_benchmark_that_was_not_run_has_no_score(data, tmp_path):
    write_mini_run(data, tmp_path, ("pope",), left_out={"gqa": "gqa: questions.json is missing; get it there"})
    html, markdown, text = (path.read_text() for path in write_report(tmp_path))
    assert row_of(markdown, "SEED")[1:3] == [MISSING, "not run"]
    assert row_of(markdown, "GQA")[1:3] == [MISSING, "left out"]
    assert all("gqa: questions.json is missing; get it there" in page for page in (markdown, html))
    assert len(json.loads(text)["not_run"]) == 9


def test_page_makes_no_requests(whole):
    html = whole[1]
    assert html.lstrip().startswith("<!doctype html>")
    assert "<script" not in html and "url(http" not in html
    for _, target in re.findall(r'\b(src|href)="([^"]*)"', html):
        assert target.startswith(("data:", "#"))


def test_failed_questions_are_counted_with_their_errors(whole):
    _, html, markdown, text = whole
    found = json.loads(text)["benchmarks"]["textvqa"]
    assert found["failed"] == 2
    assert found["failures"] == [[name, f"MediaError: {name}: not an image"] for name in FAILS]
    for page in (html, markdown):
        assert f"MediaError: {FAILS[1]}: not an image" in page
    assert 2 in numbers(json.loads(text)["before_comparing"]["TextVQA"])


def test_wrong_answers_are_shown_with_image_question_truth_and_rule(whole):
    _, html, _, text = whole
    sample = json.loads(text)["benchmarks"]["scienceqa"]["sample"]
    # The first question, whose truth is A; "no" is no letter. The last one has no image and is not scored.
    assert [(one["id"], one["answer"], one["truth"]) for one in sample] == [("1", "no", "A")]
    options = "A. circle\nB. square\nC. triangle"
    assert sample[0]["question"] == f"Context: Look at the picture.\nWhich shape is this?\n{options}"
    assert sample[0]["rule"]
    section = html[html.index('id="sqa-i"') : html.index('id="textvqa"')]
    assert section.count("<img ") == 1 and sample[0]["rule"] in section
    encoded = re.search(r'src="data:image/png;base64,([^"]+)"', section)[1]
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
    assert image[24, 24].tolist() == [255, 0, 0]


def test_categories_have_means_and_intervals(whole):
    _, html, markdown, text = whole
    categories = {one["name"]: one for one in json.loads(text)["benchmarks"]["gqa"]["categories"]}
    # The first of three questions about each image, which asks for the shape, is answered "no".
    assert (categories["query"]["questions"], categories["query"]["mean"]) == (6, 50.0)
    assert categories["verify"]["mean"] == 100.0
    assert markdown_rows(markdown)["query"] == ["6", "50.0", "50.0 to 50.0"]
    assert "query (6)" in html


def test_missing_images_are_replaced_by_the_reason(data, tmp_path):
    moved = write_mini_datasets(tmp_path / "data")
    write_mini_run(moved, tmp_path / "run", ("gqa",), answer=lambda n, item: "no idea")
    (moved / "gqa" / "images" / "n000001.jpg").unlink()
    (moved / "gqa" / "images" / "n000002.jpg").write_bytes(b"no image")
    html = write_report(tmp_path / "run")[0].read_text()
    assert html.count("<img ") == 1
    assert "n000001.jpg" in html and "n000002.jpg" in html
    assert html.count("no idea") >= 3


def test_run_without_data_directory_has_a_page_without_images(tmp_path):
    fake_run(tmp_path, [score_record(1, 0.0), score_record(2, 1.0)])
    page = HtmlPage(write_report(tmp_path)[0])
    assert page.images == [] and "easy-vqa" in page.sections


def test_few_shot_question_is_shown_with_its_own_image(tmp_path):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    asked = (
        Message.of("user", CoreImage(red), "?"),
        Message.of("assistant", "x"),
        Message.of("user", CoreImage(blue), "?"),
    )
    (shown,) = load_samples([QuestionScore("q", 0.0)], tmp_path / "none.jsonl", lambda: [Item("q", asked, "", "")])
    assert shown.image.getpixel((4, 4)) == (0, 0, 255)


def test_score_of_several_items_is_shown_with_its_item(tmp_path):
    colours = {"7": "red", "1000007": "blue"}
    items = [
        Item(name, (Message.of("user", CoreImage(Image.new("RGB", (8, 8), colour)), colour),), "", "7")
        for name, colour in colours.items()
    ]
    write_jsonl(tmp_path / "p.jsonl", [{"id": name, "prompt": colour, "text": ""} for name, colour in colours.items()])
    (shown,) = load_samples([QuestionScore("7", 0.0, item="1000007")], tmp_path / "p.jsonl", lambda: items)
    assert (shown.question, shown.image.getpixel((4, 4))) == ("blue", (0, 0, 255))


def test_sample_is_independent_of_order_and_covers_the_categories():
    question_scores = [
        QuestionScore(f"q{n}", 0.0, group=f"p{n // 2}", category="a" if n < 90 else "b") for n in range(100)
    ]
    chosen = sample_scores(question_scores, "gqa", 8)
    assert sample_scores(question_scores[::-1], "gqa", 8) == chosen
    assert [one.category for one in chosen].count("b") == 4
    assert len({one.group for one in chosen}) == 8
    assert sample_scores(question_scores, "pope", 8) != chosen
    # Without the shown one, the others stay.
    left = sample_scores([one for one in question_scores if one != chosen[0]], "gqa", 8)
    assert set(chosen[1:]) <= set(left) | {one for one in chosen if one.group == chosen[0].group}


def test_page_size_does_not_grow_with_the_benchscore_record(tmp_path):
    sizes = []
    for count in (300, 30_000):
        question_scores = [
            score_record(n, float(n % 3 > 0), category=f"kind {n % 50}", answer="long " * 100) for n in range(count)
        ]
        figures = {f"figure {n}": n for n in range(count // 10)}
        sizes.append(len(write_report(fake_run(tmp_path / str(count), question_scores, scores=figures))[0].read_text()))
    assert sizes[1] < 1.3 * sizes[0] < 200_000
    assert len(read_json(tmp_path / "30000" / "report.json")["benchmarks"]["easy_vqa"]["categories"]) == 30


def test_photos_are_stored_as_jpeg(tmp_path):
    image = write_mini_datasets(tmp_path / "data") / "vizwiz" / "test" / "VizWiz_test_00000000.jpg"
    Image.new("RGB", (400, 300), "red").save(image)
    shown = load_samples(
        [QuestionScore("0", 0.0)], tmp_path / "none.jsonl", BENCHMARKS["vizwiz"](tmp_path / "data", 0).items
    )
    assert shown[0].image.size == (320, 240)
    fake_run(tmp_path / "run", [{"id": "0", "value": 0.0}], "vizwiz", facts={"data": str(tmp_path / "data")})
    assert 'src="data:image/jpeg;base64,' in write_report(tmp_path / "run")[0].read_text()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 800, 3), dtype=np.uint8))
    photo, drawing = embed(noise, photo=True), embed(noise)
    assert photo.uri.startswith("data:image/jpeg") and drawing.uri.startswith("data:image/png")
    assert len(photo.uri) < 0.5 * len(drawing.uri)
    assert embed(noise.resize((40, 30)), photo=True).uri.startswith("data:image/png")


def test_few_shot_curves_start_at_zero_shot(data, tmp_path):
    plain = BENCHMARKS["gqa"](data, 0)
    pool = [item for item in BENCHMARKS["textvqa"](data, 0).items() if item.truth]
    variants = [plain, *(few_shot(plain, 1, pool, 0, shuffled) for shuffled in (False, True))]
    for wrong, variant in zip((9, 3, 6), variants, strict=True):
        answers = Answers(variant, lambda n, item, wrong=wrong: "x" if n < wrong else item.truth)
        run_benchmark(answers, variant, tmp_path / variant.name, model_id="abc")
    names = {variant.name: variant.name for variant in variants}
    write_json(tmp_path / "eval.json", {"model": "m", "data": str(data), "benchmarks": names})
    html = write_report(tmp_path, {variant.name: variant for variant in variants})[0].read_text()
    section = html[html.index('id="few-shot-gqa"') :]
    description = re.search(r"<desc>(.*?)</desc>", section)[1]
    assert numbers(re.sub(r" \(.*?\)", "", description)) == [0, 0, 66.67, 1, 0, 0, 33.33, 1]
    markdown = (tmp_path / "report.md").read_text()
    markdown = markdown[markdown.index("## Few-shot: GQA") :]
    assert row_of(markdown, "0") == ["0", "0.00", "0.0 to 0.0", *[MISSING] * 4]
    # Of three images with three questions each, two are right after true examples and one after wrong ones.
    assert row_of(markdown, "1")[1:6:2] == ["66.67", "33.33", "+33.33 (0.00 to +100.00)"]


def test_curve_shows_only_intervals_of_the_score(tmp_path):
    sure = {"mean": 80.0, "low": 70.0, "high": 90.0, "questions": 1, "groups": 1}
    fake_run(tmp_path, [score_record(1, 1.0)], "x_1shot", scores={"score": 80.0, "interval": sure})
    fake_run(tmp_path, [score_record(1, 1.0)], "x_2shot", scores={"score": 50.0, "interval": sure})
    html, markdown, _ = (path.read_text() for path in write_report(tmp_path))
    assert row_of(markdown, "x\\_1shot")[3] == "70.0 to 90.0"
    assert numbers(re.search(r"<desc>(.*?)</desc>", html)[1]) == [80, 1, 70, 90, 50, 2]


def test_speed_in_questions_and_tokens(tmp_path):
    counted = {"seconds": 4.0, "answered": 10, "tokens": 30, "prompt_tokens": 500}
    not_counted = {"seconds": 6.0, "answered": 5}
    for name, speed in (("easy_vqa", counted), ("other", not_counted)):
        fake_run(tmp_path, [score_record(1, 1.0)], name)
        write_json(tmp_path / name / "speed.json", speed)
    markdown = write_report(tmp_path)[1].read_text()
    rows = markdown_rows(markdown)
    assert rows["easy\\_vqa"] == ["10", "4", "2.5", "3", "7.5", "125"]
    assert rows["other"] == ["5", "6", "0.8333", *[MISSING] * 3]
    assert rows["all"] == ["15", "10", "1.5", "3", "7.5", "125"]


def test_answers_are_escaped(tmp_path):
    evil = "</dd><script>x</script> | `a` *b* \n| c | "
    question_scores = [
        score_record(1, 0.0, answer=evil, rule="<b>", category="k|1"),
        score_record(2, 1.0, category="<i>"),
    ]
    fake_run(tmp_path, question_scores, scores={"notes": [evil]})
    html, markdown, text = (path.read_text() for path in write_report(tmp_path))
    assert "<script>x" not in html and "<b>" not in html
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 5 for line in table if "mean score" in line or "k\\|1" in line)
    assert "\\| c \\|" in markdown
    assert json.loads(text)["benchmarks"]["easy_vqa"]["sample"][0]["answer"] == evil


def test_non_finite_numbers_are_null_in_json(tmp_path):
    fake_run(tmp_path, [score_record(1, 1.0)], scores={"odd": float("nan"), "deep": {"inf": float("inf")}})
    text = write_report(tmp_path)[2].read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert found["benchmarks"]["easy_vqa"]["metrics"] == {"odd": None, "deep": {"inf": None}}


def test_report_of_an_unfinished_run(tmp_path):
    fake_run(tmp_path, [score_record(1, 1.0)])
    write_json(tmp_path / "eval.json", {"model": "m", "benchmarks": {"easy_vqa": "easy_vqa", "pope": "pope-500"}})
    markdown = write_report(tmp_path)[1].read_text()
    assert row_of(markdown, "POPE")[1] == MISSING and "scores.json" in markdown
    assert row_of(markdown, "easy\\_vqa")[1] == "100.00"


SCORES = "easy_vqa/question_scores.jsonl"


@pytest.mark.parametrize(
    ("file", "content", "record", "field"),
    [
        ("eval.json", '{"benchmarks": ["a"]}', None, "benchmarks"),
        (SCORES, '{"id": "q1", "val', "line 1", None),
        (SCORES, '{"id": "q1"}\n', "line 1", None),
        (SCORES, '{"id": "q", "value": "x"}\n', "line 1", None),
        (SCORES, '{"id": 5, "value": 1}\n', "line 1", None),
        ("easy_vqa/scores.json", "[]", None, None),
        ("easy_vqa/scores.json", '{"score": "x"}', None, "score"),
        ("easy_vqa/scores.json", '{"interval": {"low": {}}}', None, "interval.low"),
        ("easy_vqa/scores.json", '{"notes": 5}', None, "notes"),
        ("easy_vqa/scores.json", '{"rules": "x"}', None, "rules"),
        ("easy_vqa/run.json", "[]", None, None),
        ("easy_vqa/speed.json", "{}", None, "seconds"),
    ],
)
def test_damaged_run_folder_is_refused_and_nothing_is_written(tmp_path, file, content, record, field):
    fake_run(tmp_path, [score_record(1, 1.0)])
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError) as caught:
        write_report(tmp_path)
    assert (caught.value.file, caught.value.record, caught.value.field) == (str(tmp_path / file), record, field)
    assert not list(tmp_path.glob("report.*"))


def test_folder_without_eval_json_is_no_run(tmp_path):
    with pytest.raises(DataError) as caught:
        write_report(tmp_path)
    assert caught.value.file == str(tmp_path) and "vila eval --output" in caught.value.hint


def test_question_scores_of_version_0_1_are_read(tmp_path):
    write_jsonl(tmp_path / "marks.jsonl", [{"id": "1", "value": 0.5, "group": "g", "kind": "color"}])
    assert read_question_scores(tmp_path) == [QuestionScore("1", 0.5, "g", "color")]
    write_question_scores(tmp_path, [QuestionScore("1", 1.0)])
    assert [path.name for path in tmp_path.iterdir()] == ["question_scores.jsonl"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<image>\nWhat?\nAnswer the question using a single word or phrase.", "What?"),
        ("A. x\nAnswer with the option's letter from the given choices directly.", "A. x"),
        ("y" * 300, "y" * 300),
        ("y" * 301, "y" * 299 + "\N{HORIZONTAL ELLIPSIS}"),
    ],
)
def test_answer_format_instructions_are_removed(text, shown):
    assert shorten(text) == shown


def test_runs_are_compared_by_question(tmp_path):
    # 20 questions about an image each: four become right, one becomes wrong, so 3 of 20 more are right.
    before = [score_record(n, float(n >= 4)) for n in range(20)]
    after = [score_record(n, float(n != 19), answer="b") for n in range(20)]
    first, second = fake_run(tmp_path / "a", before), fake_run(tmp_path / "b", after)
    html, markdown, text = (path.read_text() for path in compare_runs(first, second, tmp_path / "out"))
    found = json.loads(text)["benchmarks"]["easy_vqa"]
    assert (found["better"], found["worse"], found["questions"]) == (4, 1, 20)
    assert found["scores"] == [80.0, 95.0] and found["difference"] == 15.0
    assert found["low"] < 15 < found["high"]
    # Of the 32 ways in which five changes can fall, 12 are as lopsided as four to one.
    assert found["p"] == pytest.approx(12 / 32, abs=0.04)
    assert sorted(change["id"] for change in found["changes"]) == ["q0", "q1", "q19", "q2", "q3"]
    assert found["changes"][-1]["values"] == [1.0, 0.0]
    assert row_of(markdown, "easy\\_vqa (%)")[1:4] == ["80.00", "95.00", "+15.00"]
    assert html.count('class="mark">better') == 4 and html.count('class="mark">worse') == 1


def test_benchmarks_that_cannot_be_compared_are_listed(tmp_path):
    one = fake_run(tmp_path / "a", [score_record(n, 1.0) for n in range(4)])
    fake_run(one, [score_record(1, 1.0)], "pope")
    fake_run(one, [score_record(1, 1.0)], "gqa", protocol="lmms-eval")
    fake_run(one, [], "seed", scores={"problem": "not scored here"})
    two = fake_run(tmp_path / "b", [score_record(n, 1.0) for n in range(2, 5)])
    fake_run(two, [score_record(1, 1.0)], "gqa")
    fake_run(two, [score_record(1, 1.0)], "seed")
    _, markdown, text = (path.read_text() for path in compare_runs(one, two, tmp_path / "out"))
    found = json.loads(text)
    assert list(found["benchmarks"]) == ["easy_vqa"]
    assert found["benchmarks"]["easy_vqa"]["questions"] == 2
    assert numbers(found["benchmarks"]["easy_vqa"]["remark"])[0] == 3
    assert found["benchmarks"]["easy_vqa"]["remark"] in markdown
    assert str(two) in found["not_compared"]["POPE"]
    assert "lmms-eval" in found["not_compared"]["GQA"] and "upstream" in found["not_compared"]["GQA"]
    assert found["not_compared"]["SEED"].endswith("seed: not scored here")


def test_runs_without_common_questions_are_refused(tmp_path):
    one, two = fake_run(tmp_path / "a", [score_record(1, 1.0)]), fake_run(tmp_path / "b", [score_record(2, 1.0)])
    with pytest.raises(DataError) as caught:
        compare_runs(one, two, tmp_path / "out")
    assert caught.value.file == str(two)
    assert not (tmp_path / "out").exists()
