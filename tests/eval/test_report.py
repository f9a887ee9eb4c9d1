"""The report of a run and the comparison of two: what stands in them, and that they are whole, bounded and honest."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.eval.mini import Answers, mini_data, mini_run, truly
from vila.core.errors import DataError
from vila.core.files import write_json, write_jsonl
from vila.core.reading import read_json
from vila.core.types import Image as CoreImage
from vila.core.types import Message
from vila.eval.benchmark import BENCHMARKS, Item, Mark
from vila.eval.few_shot import with_shots
from vila.eval.published import published_table
from vila.eval.report import compare_runs, write_report
from vila.eval.report_data import shorten, show, spread
from vila.eval.runner import run
from vila.report.html import embed
from vila.report.numbers import MISSING

FAILS = ("0000000000000001/what color is it?", "0000000000000002/what color is it?")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return mini_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of all ten, a third of the answers "no", two of TextVQA's questions not to be asked; its reports."""
    out = tmp_path_factory.mktemp("run") / "mine"
    mini_run(data, out, answer=lambda n, item: truly(n, item) if n % 3 else "no", fails=set(FAILS))
    return out, *[path.read_text() for path in write_report(out)]


def fake_run(folder, marks, name="easy_vqa", rules="upstream", scores=None, facts=None):
    """A run's folder with these marks and no more than a report needs."""
    mean = 100 * sum(mark["value"] for mark in marks) / len(marks) if marks else None
    own = {"benchmark": name, "rules": rules, "score": mean, "unit": "%", "interval": None, "notes": []}
    write_json(folder / name / "scores.json", {**own, **(scores or {})})
    write_jsonl(folder / name / "marks.jsonl", marks)
    write_jsonl(folder / name / "predictions.jsonl", [{"id": m["id"], "prompt": "what?", "text": "x"} for m in marks])
    before = read_json(folder / "eval.json")["benchmarks"] if (folder / "eval.json").is_file() else {}
    write_json(folder / "eval.json", {"model": "m", "data": "", **(facts or {}), "benchmarks": {**before, name: name}})
    return folder


def mark(number, value, **fields):
    return {"id": f"q{number}", "value": value, "group": f"p{number}", "answer": "a", "truth": "t", **fields}


def row_of(markdown, title):
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_published_rows_are_the_published_ones():
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


def test_the_table_has_ours_with_its_interval_beside_the_published_rows(whole):
    _, _, markdown, _ = whole
    # Nine questions about three pictures, the first one about each is answered "no": two of three right in each.
    assert row_of(markdown, "GQA") == ["GQA", "66.67", "66.7 to 66.7", "63.1", "63.0", "63.6", "63.6"]
    assert row_of(markdown, "VQAv2")[:4] == ["VQAv2", MISSING, "not scored here", "80.3"]
    assert "VILA-13B INT4, published" in markdown
    assert "- VQAv2: not scored here: vqav2:" in markdown and "EvalAI challenge 830" in markdown
    assert "- GQA: 9 questions were asked; the published figure is of 12,578." in markdown
    assert "stand-in for the server" in markdown


def test_an_interval_that_is_not_of_the_headline_says_what_it_is_of(tmp_path):
    sure = {"mean": 80.0, "low": 70.0, "high": 90.0, "questions": 1, "groups": 1}
    fake_run(tmp_path, [mark(1, 1.0)], "gqa", scores={"score": 60.0, "interval": sure})
    page, markdown, text = (path.read_text() for path in write_report(tmp_path))
    assert row_of(markdown, "GQA")[2] == "70.0 to 90.0 (mean mark 80.0 %)"
    assert json.loads(text)["benchmarks"]["gqa"]["interval_is_of_score"] is False
    assert "The interval is that of the mean mark, which the score is not." in page


@pytest.mark.parametrize("name", ["mme", "pope"])
def test_points_and_f1_have_intervals_of_their_own(whole, name):
    found = json.loads(whole[3])["benchmarks"][name]
    assert found["interval_is_of_score"] is True
    assert found["interval"]["low"] <= found["score"] <= found["interval"]["high"]


def test_a_benchmark_that_was_not_run_is_named_and_has_no_figure(data, tmp_path):
    mini_run(data, tmp_path, ("pope",), left_out={"gqa": "gqa: questions.json is missing; get it there"})
    html, markdown, text = (path.read_text() for path in write_report(tmp_path))
    assert row_of(markdown, "SEED")[1:3] == [MISSING, "not run"]
    assert row_of(markdown, "GQA")[1:3] == [MISSING, "left out"]
    assert "- GQA: gqa: questions.json is missing; get it there" in markdown
    assert "questions.json is missing" in html
    assert len(json.loads(text)["not_run"]) == 9


def test_the_page_is_one_file_that_loads_nothing(whole):
    html = whole[1]
    assert html.lstrip().startswith("<!doctype html>")
    assert "<script" not in html and "url(http" not in html
    for _, target in re.findall(r'\b(src|href)="([^"]*)"', html):
        assert target.startswith(("data:", "#"))


def test_questions_that_could_not_be_asked_are_counted_with_their_errors(whole):
    _, html, markdown, text = whole
    found = json.loads(text)["benchmarks"]["textvqa"]
    assert found["failed"] == 2
    assert found["failures"] == [[name, f"MediaError: {name}: not a picture"] for name in FAILS]
    for page in (html, markdown):
        assert "2 questions could not be asked" in page and f"MediaError: {FAILS[1]}: not a picture" in page
    assert "2 questions without an answer, not counted" in html
    assert "2 questions could not be asked." in json.loads(text)["before_comparing"]["TextVQA"]
    assert "2 of them could not be asked" in html


def test_wrong_answers_are_shown_with_picture_question_truth_and_rule(whole):
    _, html, _, text = whole
    sample = json.loads(text)["benchmarks"]["scienceqa"]["sample"]
    # The first question, whose truth is A; "no" is no letter. The last one has no picture and is not scored.
    assert [(one["id"], one["answer"], one["truth"]) for one in sample] == [("1", "no", "A")]
    options = "A. circle\nB. square\nC. triangle"
    assert sample[0]["question"] == f"Context: Look at the picture.\nWhich shape is this?\n{options}"
    assert sample[0]["rule"]
    section = html[html.index('id="sqa-i"') : html.index('id="textvqa"')]
    assert section.count("<img ") == 1 and sample[0]["rule"] in section
    encoded = re.search(r'src="data:image/png;base64,([^"]+)"', section)[1]
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
    assert picture[24, 24].tolist() == [255, 0, 0]


def test_kinds_have_their_means_and_intervals(whole):
    _, html, markdown, text = whole
    kinds = {kind["name"]: kind for kind in json.loads(text)["benchmarks"]["gqa"]["kinds"]}
    # The first of three questions about each picture, which asks for the shape, is answered "no".
    assert (kinds["query"]["questions"], kinds["query"]["mean"]) == (6, 50.0)
    assert kinds["verify"]["mean"] == 100.0
    assert "| query | 6 | 50.0 | 50.0 to 50.0 |" in markdown
    assert "query (6), score: 50.0\N{NO-BREAK SPACE}% (50.0" in html


def test_pictures_that_are_not_there_leave_the_answers_and_say_why(data, tmp_path):
    moved = mini_data(tmp_path / "data")
    mini_run(moved, tmp_path / "run", ("gqa",), answer=lambda n, item: "no idea")
    (moved / "gqa" / "images" / "n000001.jpg").unlink()
    (moved / "gqa" / "images" / "n000002.jpg").write_bytes(b"no picture")
    html = write_report(tmp_path / "run")[0].read_text()
    assert html.count("<img ") == 1
    assert "n000001.jpg" in html and "n000002.jpg: not an image" in html
    assert html.count("no idea") >= 3


def test_a_run_that_does_not_say_where_its_data_are_has_a_page_without_pictures(tmp_path):
    fake_run(tmp_path, [mark(1, 0.0), mark(2, 1.0)])
    html = write_report(tmp_path)[0].read_text()
    assert "the run does not say where its data are" in html and "<img " not in html


def test_a_question_after_examples_is_shown_with_its_own_picture(tmp_path):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    asked = (
        Message.of("user", CoreImage(red), "?"),
        Message.of("assistant", "x"),
        Message.of("user", CoreImage(blue), "?"),
    )
    (shown,) = show([Mark("q", 0.0)], tmp_path / "none.jsonl", lambda: [Item("q", asked, "", "")])
    assert shown.picture.getpixel((4, 4)) == (0, 0, 255)


def test_the_answer_to_one_of_several_items_is_shown_with_that_item(tmp_path):
    colours = {"7": "red", "1000007": "blue"}
    items = [
        Item(name, (Message.of("user", CoreImage(Image.new("RGB", (8, 8), colour)), colour),), "", "7")
        for name, colour in colours.items()
    ]
    write_jsonl(tmp_path / "p.jsonl", [{"id": name, "prompt": colour, "text": ""} for name, colour in colours.items()])
    (shown,) = show([Mark("7", 0.0, item="1000007")], tmp_path / "p.jsonl", lambda: items)
    assert (shown.question, shown.picture.getpixel((4, 4))) == ("blue", (0, 0, 255))


def test_the_same_wrong_answers_are_shown_whatever_their_order_and_each_kind_has_its_turn():
    marks = [Mark(f"q{n}", 0.0, group=f"p{n // 2}", kind="a" if n < 90 else "b") for n in range(100)]
    chosen = spread(marks, "gqa", 8)
    assert spread(marks[::-1], "gqa", 8) == chosen
    assert [one.kind for one in chosen].count("b") == 4
    assert len({one.group for one in chosen}) == 8
    assert spread(marks, "pope", 8) != chosen
    # Without the shown one, the others stay.
    left = spread([one for one in marks if one != chosen[0]], "gqa", 8)
    assert set(chosen[1:]) <= set(left) | {one for one in chosen if one.group == chosen[0].group}


def test_a_large_benchmark_gives_no_larger_page(tmp_path):
    sizes = []
    for count in (300, 30_000):
        marks = [mark(n, float(n % 3 > 0), kind=f"kind {n % 50}", answer="long " * 100) for n in range(count)]
        figures = {f"figure {n}": n for n in range(count // 10)}
        sizes.append(len(write_report(fake_run(tmp_path / str(count), marks, scores=figures))[0].read_text()))
    assert sizes[1] < 1.3 * sizes[0] < 200_000
    assert len(read_json(tmp_path / "30000" / "report.json")["benchmarks"]["easy_vqa"]["kinds"]) == 30


def test_photographs_stay_small(tmp_path):
    picture = mini_data(tmp_path / "data") / "vizwiz" / "test" / "VizWiz_test_00000000.jpg"
    Image.new("RGB", (400, 300), "red").save(picture)
    shown = show([Mark("0", 0.0)], tmp_path / "none.jsonl", BENCHMARKS["vizwiz"](tmp_path / "data", 0).items)
    assert shown[0].picture.size == (320, 240)
    fake_run(tmp_path / "run", [{"id": "0", "value": 0.0}], "vizwiz", facts={"data": str(tmp_path / "data")})
    assert 'src="data:image/jpeg;base64,' in write_report(tmp_path / "run")[0].read_text()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 800, 3), dtype=np.uint8))
    photo, drawing = embed(noise, photo=True), embed(noise)
    assert photo.uri.startswith("data:image/jpeg") and drawing.uri.startswith("data:image/png")
    assert len(photo.uri) < 0.5 * len(drawing.uri)
    assert embed(noise.resize((40, 30)), photo=True).uri.startswith("data:image/png")


def test_scores_by_number_of_examples_are_a_curve_from_none_on(data, tmp_path):
    plain = BENCHMARKS["gqa"](data, 0)
    pool = [item for item in BENCHMARKS["textvqa"](data, 0).items() if item.truth]
    variants = [plain, *(with_shots(plain, 1, pool, 0, shuffled) for shuffled in (False, True))]
    for wrong, variant in zip((9, 3, 6), variants, strict=True):
        answers = Answers(variant, lambda n, item, wrong=wrong: "x" if n < wrong else item.truth)
        run(answers, variant, tmp_path / variant.name, model="abc")
    names = {variant.name: variant.name for variant in variants}
    write_json(tmp_path / "eval.json", {"model": "m", "data": str(data), "benchmarks": names})
    html = write_report(tmp_path, {variant.name: variant for variant in variants})[0].read_text()
    section = html[html.index('id="in-context-gqa"') :]
    told = re.search(r"<desc>(.*?)</desc>", section)[1]
    assert re.sub(r" \(.*?\)", "", told) == (
        "examples with true answers: 0 at 0, 66.67 at 1; examples with wrong answers: 0 at 0, 33.33 at 1"
    )
    markdown = (tmp_path / "report.md").read_text()
    markdown = markdown[markdown.index("## In context: GQA") :]
    assert row_of(markdown, "0") == ["0", "0.00", "0.0 to 0.0", *[MISSING] * 4]
    # Of three pictures with three questions each, two are right after true examples and one after wrong ones.
    assert row_of(markdown, "1")[1:6:2] == ["66.67", "33.33", "+33.33 (0.00 to +100.00)"]


def test_an_interval_has_its_lower_end_first_and_a_curve_only_its_own(tmp_path):
    sure = {"mean": 80.0, "low": 70.0, "high": 90.0, "questions": 1, "groups": 1}
    fake_run(tmp_path, [mark(1, 1.0)], "x_1shot", scores={"score": 80.0, "interval": sure})
    fake_run(tmp_path, [mark(1, 1.0)], "x_2shot", scores={"score": 50.0, "interval": sure})
    html, markdown, _ = (path.read_text() for path in write_report(tmp_path))
    assert row_of(markdown, "x\\_1shot")[3] == "70.0 to 90.0"
    assert "examples with true answers: 80 at 1 (70 to 90), 50 at 2<" in html


def test_speed_is_in_questions_and_where_they_were_counted_in_tokens(tmp_path):
    counted = {"seconds": 4.0, "answered": 10, "tokens": 30, "prompt_tokens": 500}
    not_counted = {"seconds": 6.0, "answered": 5}
    for name, speed in (("easy_vqa", counted), ("other", not_counted)):
        fake_run(tmp_path, [mark(1, 1.0)], name)
        write_json(tmp_path / name / "speed.json", speed)
    markdown = write_report(tmp_path)[1].read_text()
    assert "| easy\\_vqa | 10 | 4 | 2.5 | 3 | 7.5 | 125 |" in markdown
    assert f"| other | 5 | 6 | 0.8333 | {MISSING} | {MISSING} | {MISSING} |" in markdown
    assert "| all | 15 | 10 | 1.5 | 3 | 7.5 | 125 |" in markdown


def test_what_an_answer_holds_cannot_break_a_page(tmp_path):
    evil = "</dd><script>x</script> | `a` *b* \n| c | "
    marks = [mark(1, 0.0, answer=evil, rule="<b>", kind="k|1"), mark(2, 1.0, kind="<i>")]
    fake_run(tmp_path, marks, scores={"notes": [evil]})
    html, markdown, text = (path.read_text() for path in write_report(tmp_path))
    assert "<script>x" not in html and "<b>" not in html
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 5 for line in table if "points won" in line or "k\\|1" in line)
    assert "\\| c \\|" in markdown
    assert json.loads(text)["benchmarks"]["easy_vqa"]["sample"][0]["answer"] == evil


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path):
    fake_run(tmp_path, [mark(1, 1.0)], scores={"odd": float("nan"), "deep": {"inf": float("inf")}})
    text = write_report(tmp_path)[2].read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert found["benchmarks"]["easy_vqa"]["figures"] == {"odd": None, "deep": {"inf": None}}


def test_a_run_that_was_cut_off_is_reported_as_far_as_it_came(tmp_path):
    fake_run(tmp_path, [mark(1, 1.0)])
    write_json(tmp_path / "eval.json", {"model": "m", "benchmarks": {"easy_vqa": "easy_vqa", "pope": "pope-500"}})
    markdown = write_report(tmp_path)[1].read_text()
    assert "- POPE: not finished: no scores.json" in markdown
    assert row_of(markdown, "easy\\_vqa")[1] == "100.00"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "eval.json").unlink(), "no eval.json; give the directory that `vila eval --output` wrote"),
        (lambda run: write_json(run / "eval.json", {"benchmarks": ["a"]}), r"expected folders by benchmark .*\['a'\]"),
        (lambda run: (run / "easy_vqa/marks.jsonl").write_text('{"id": "q1", "val'), "marks.jsonl, line 1: not JSON"),
        (lambda run: (run / "easy_vqa/marks.jsonl").write_text('{"id": "q1"}\n'), "marks.jsonl line 1: not a mark"),
        (lambda run: (run / "easy_vqa/marks.jsonl").write_text('{"id": "q", "value": "x"}\n'), "line 1: not a mark"),
        (lambda run: (run / "easy_vqa/marks.jsonl").write_text('{"id": 5, "value": 1}\n'), "line 1: not a mark"),
        (lambda run: (run / "easy_vqa/scores.json").write_text("[]"), "scores.json: not a JSON object"),
        (lambda run: (run / "easy_vqa/scores.json").write_text('{"score": "x"}'), "scores.json: score: got 'x'"),
        (lambda run: (run / "easy_vqa/scores.json").write_text('{"interval": {"low": {}}}'), "interval.low"),
        (lambda run: (run / "easy_vqa/scores.json").write_text('{"notes": 5}'), "scores.json: notes: got 5"),
        (lambda run: (run / "easy_vqa/scores.json").write_text('{"rules": "x"}'), "scores.json: rules: got 'x'"),
        (lambda run: (run / "easy_vqa/run.json").write_text("[]"), "run.json: not a JSON object"),
        (lambda run: (run / "easy_vqa/speed.json").write_text("{}"), "speed.json: seconds: missing"),
    ],
)  # fmt: skip
def test_what_is_no_run_is_refused_by_name_and_nothing_is_written(tmp_path, spoil, message):
    spoil(fake_run(tmp_path, [mark(1, 1.0)]))
    with pytest.raises(DataError, match=message):
        write_report(tmp_path)
    assert not list(tmp_path.glob("report.*"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<image>\nWhat?\nAnswer the question using a single word or phrase.", "What?"),
        ("A. x\nAnswer with the option's letter from the given choices directly.", "A. x"),
        ("y" * 300, "y" * 300),
        ("y" * 301, "y" * 299 + "\N{HORIZONTAL ELLIPSIS}"),
    ],
)
def test_questions_are_shown_without_what_all_of_them_end_with(text, shown):
    assert shorten(text) == shown


def test_two_runs_are_compared_question_by_question(tmp_path):
    # 20 questions about a picture each: four become right, one becomes wrong, so 3 of 20 more are right.
    before = [mark(n, float(n >= 4)) for n in range(20)]
    after = [mark(n, float(n != 19), answer="b") for n in range(20)]
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


def test_what_cannot_be_compared_is_left_out_and_said(tmp_path):
    one = fake_run(tmp_path / "a", [mark(n, 1.0) for n in range(4)])
    fake_run(one, [mark(1, 1.0)], "pope")
    fake_run(one, [mark(1, 1.0)], "gqa", rules="lmms-eval")
    fake_run(one, [], "seed", scores={"problem": "not scored here"})
    two = fake_run(tmp_path / "b", [mark(n, 1.0) for n in range(2, 5)])
    fake_run(two, [mark(1, 1.0)], "gqa")
    fake_run(two, [mark(1, 1.0)], "seed")
    _, markdown, text = (path.read_text() for path in compare_runs(one, two, tmp_path / "out"))
    found = json.loads(text)
    assert list(found["benchmarks"]) == ["easy_vqa"]
    assert found["benchmarks"]["easy_vqa"]["questions"] == 2
    assert "3 questions were scored in one of the runs only and do not count" in markdown
    assert found["not_compared"]["POPE"] == f"not in the run {two}"
    assert "- GQA: not compared: scored by other rules: lmms-eval and upstream" in markdown
    assert found["not_compared"]["SEED"].endswith("seed: not scored here")


def test_runs_without_anything_in_common_are_refused(tmp_path):
    one, two = fake_run(tmp_path / "a", [mark(1, 1.0)]), fake_run(tmp_path / "b", [mark(2, 1.0)])
    with pytest.raises(DataError, match="nothing to compare .*the two runs have no question in common"):
        compare_runs(one, two, tmp_path / "out")
    assert not (tmp_path / "out").exists()
