"""MMBench: circular accuracy worked out by hand, empty options, submission file, damaged tables."""

import base64
import io
import sys

import pytest

from tests.eval.benchmarks.written import VICUNA, whole_prompt
from tests.eval.checks import has_note, refused
from vila.core.errors import DataError
from vila.core.optional import MissingExtraError
from vila.eval.benchmark import BENCHMARKS, Answer
from vila.eval.benchmarks.mmbench import STATIC_MATCHER, MmBench
from vila.eval.submit import xlsx_bytes

COLUMNS = [
    "index", "question", "hint", "A", "B", "C", "D",
    "answer", "category", "image", "source", "l2-category", "comment", "split",
]  # fmt: skip
LETTER = "Answer with the option's letter from the given choices directly."
PETS = ["cat", "dog"]
# Options, place of the true one, answers to the rotations (None: no row), whether all and the first are right, why.
ROWS = [
    (["red", "green", "blue"], 0, ["A", "C", "B"], 1, 1, "letters alone; rotated truths"),
    (PETS, 0, ["A. cat", "B"], 1, 1, "a letter with a full stop"),
    (PETS, 0, ["A", "A"], 0, 1, "one wrong rotation"),
    (PETS, 0, ["It is a cat", "(B)"], 1, 1, "one option's text; a letter in brackets"),
    (PETS, 0, ["A cat is here", "b"], 0, 1, "an article, then the text; a small letter is none"),
    (PETS, 0, ["cat or dog", "B"], 0, 0, "two options' texts"),
    (
        ["1 apple", "2 apples"],
        1,
        ["The answer is B", "\u7b54\u6848\u662fA"],
        1,
        1,
        "by rules alone the second is not read",
    ),
    (PETS, 1, ["", None], 0, 0, "an empty answer, and none"),
    (PETS, 0, ["B\nbecause", "B"], 0, 0, "a letter before a second line"),
    (["a", "b", "c", "d"], 3, ["D", "C", "B", "A"], 1, 1, "four options"),
    (["a", "b", "c", "d"], 3, ["E", "C", "B", "A"], 0, 0, "E is never right"),
]
# All rotations correct: the 1st, 2nd, 4th, 7th, 10th of 11; by rules alone not the 7th; the first right: 7 of 11.


def table(rows) -> str:
    return "".join("\t".join(map(str, cells)) + "\n" for cells in rows)


def turns(number: int, options: list[str], true: int) -> list[list]:
    image = base64.b64encode(f"image {number}".encode()).decode()
    out = []
    for turn in range(len(options)):
        rotated = options[turn:] + options[:turn] + [""] * (4 - len(options))
        letter = "ABCD"[(true - turn) % len(options)]
        index = 7 * number + 1_000_000 * turn
        kinds = [f"kind {number % 2}", image, "web", f"group {number % 3}", "", "dev"]
        out.append([index, f"What is it, {number}?", "", *rotated, letter, *kinds])
    return out


@pytest.fixture
def cells():
    return [row for n, (options, true, *_) in enumerate(ROWS) for row in turns(n, options, true)]


@pytest.fixture
def folder(tmp_path, cells):
    path = tmp_path / "mmbench" / "mmbench_dev_20230712.tsv"
    path.parent.mkdir()
    path.write_text(table([COLUMNS, *cells]), encoding="utf-8")
    return tmp_path


def answers() -> list[Answer]:
    return [
        Answer(7 * n + 1_000_000 * turn, text, f"What is it, {n}?")
        for n, row in enumerate(ROWS)
        for turn, text in enumerate(row[2])
        if text is not None
    ]


def one(tmp_path, *rows, columns=COLUMNS):
    """A table of these records, given as changes of a valid one."""
    usual = dict(zip(COLUMNS, turns(0, ["cat", "dog"], 0)[0], strict=True))
    path = tmp_path / "mmbench_dev_20230712.tsv"
    path.write_text(table([columns, *([{**usual, **row}[name] for name in columns] for row in rows)]), encoding="utf-8")
    return MmBench(tmp_path)


@pytest.mark.parametrize("protocol", ["upstream", "lmms-eval"])
def test_a_question_is_right_when_all_rotations_are(folder, protocol):
    result = BENCHMARKS["mmbench"](folder, 0).score(answers(), protocol)
    assert result.score == pytest.approx(100 * 5 / 11)
    assert result.metrics["circular_by_rules_alone"] == pytest.approx(100 * 4 / 11)
    assert result.metrics["first_round"] == pytest.approx(100 * 7 / 11)
    assert [row[-1] for row, mark in zip(ROWS, result.question_scores, strict=True) if mark.value != row[3]] == []
    assert result.notes[0] == STATIC_MATCHER


def test_scores_by_category(folder):
    metrics = MmBench(folder).score(answers()).metrics
    assert metrics["by_category"] == pytest.approx({"kind 0": 100 * 2 / 6, "kind 1": 100 * 3 / 5})
    # Groups hold the 1st, 4th, 7th, 10th; the 2nd, 5th, 8th, 11th; the 3rd, 6th, 9th.
    assert metrics["by_l2_category"] == pytest.approx({"group 0": 100, "group 1": 25, "group 2": 0})
    assert (metrics["questions"], metrics["rows"], metrics["missing"]) == (11, 27, 1)


def test_scores_show_the_first_wrong_rotation(folder):
    mark = MmBench(folder).score(answers()).question_scores[2]
    assert (mark.id, mark.answer, mark.truth, mark.rule) == ("14", "A", "B", "1 of 2 rotations correct")


def test_order_repetition_and_gaps(folder):
    rows = [Answer(0, "D"), *reversed(answers()), Answer(5, "A")]
    result = MmBench(folder).score(rows)
    assert result.score == pytest.approx(100 * 5 / 11)
    for mentions in (("without an answer", ": 1000049"), ("several answers", ": 0"), ("unknown", ": 5")):
        assert has_note(result.notes, *mentions)
    assert any(all(text in note for text in ("mmbench_dev_20230712.tsv", "27", "4,377")) for note in result.notes)


def test_answers_of_another_benchmark_are_refused(folder):
    with refused("1 answers", field="mmbench"):
        MmBench(folder).score([Answer("v16", "A")])
    with refused("question_id", "all 1", field="mmbench"):
        MmBench(folder).score([Answer("7", "A")])


def test_whole_prompts(tmp_path):
    rows = [
        {"index": 1, "hint": "Look at the map.", "C": "bird"},
        {"index": 2, "hint": "nan"},
        {"index": 3, "B": "None", "C": "bird"},
        {"index": 4, "C": "N/A", "D": "bird"},
        {"index": 5, "A": "nOnE", "B": "bird"},
        {"index": 6, "question": '"Which, ""this""\nor that?"', "D": "no C before"},
    ]
    prompts = [whole_prompt(item) for item in one(tmp_path, *rows).items()]
    end = f"\n{LETTER} ASSISTANT:"
    assert prompts[0] == f"{VICUNA}Look at the map.\nWhat is it, 0?\nA. cat\nB. dog\nC. bird{end}"
    assert prompts[1] == f"{VICUNA}What is it, 0?\nA. cat\nB. dog{end}"
    # The original stops at the first option that pandas takes for empty.
    assert prompts[2] == f"{VICUNA}What is it, 0?\nA. cat{end}"
    assert prompts[3] == f"{VICUNA}What is it, 0?\nA. cat\nB. dog{end}"
    assert prompts[4] == f"{VICUNA}What is it, 0?{end}"
    assert prompts[5] == f'{VICUNA}Which, "this"\nor that?\nA. cat\nB. dog{end}'


def test_whole_prompts_in_chinese(tmp_path, cells):
    for place in ("mmbench", "mmbench_cn", ""):
        home = tmp_path / f"at {place}"
        path = home / place / "mmbench_dev_cn_20231003.tsv"
        path.parent.mkdir(parents=True)
        cells[0][2] = "\u770b\u56fe"
        path.write_text(table([COLUMNS, *cells]), encoding="utf-8")
        item = BENCHMARKS["mmbench_cn"](home, 0).items()[0]
        assert whole_prompt(item) == (
            f"{VICUNA}\u770b\u56fe\nWhat is it, 0?\nA. red\nB. green\nC. blue\n"
            "\u8bf7\u76f4\u63a5\u56de\u7b54\u9009\u9879\u5b57\u6bcd\u3002 ASSISTANT:"
        )


def test_item_fields_equal_upstream_records(folder):
    items = MmBench(folder).items()
    assert items[1].question_id == 1_000_000
    assert items[1].prompt == "What is it, 0?\nA. green\nB. blue\nC. red"
    assert items[1].extra == {"round_id": 0, "options": ["green", "blue", "red"], "option_char": ["A", "B", "C"]}
    assert [(item.id, item.group, item.truth) for item in items[:4]] == [
        ("0", "0", "A"),
        ("1000000", "0", "C"),
        ("2000000", "0", "B"),
        ("7", "7", "A"),
    ]


def test_images_stay_in_the_table_until_they_are_read(folder):
    items = MmBench(folder).items()
    images = [item.messages[0].parts[0].source for item in items]
    assert images[3].read() == b"image 1"
    assert images[0] == images[1] != images[3]  # rotations share theirs
    path = folder / "mmbench" / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text() + "\n")
    with refused("changed", file=path.name):
        images[0].read()


def test_a_limited_benchmark_takes_whole_questions(folder):
    benchmark = MmBench(folder, limit=4)
    assert [item.group for item in benchmark.items()] == ["0", "0", "0", "7", "7"]
    assert benchmark.score(answers()[:5]).score == 100


def test_the_servers_columns_and_order(folder):
    upload = MmBench(folder).submission(list(reversed(answers())))
    assert list(upload.rows[0]) == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert [row["index"] for row in upload.rows[:4]] == [0, 1_000_000, 2_000_000, 7]
    assert list(upload.rows[3].values()) == [7, "What is it, 1?", "cat", "dog", None, None, "A. cat", "A", "dev"]
    gap = next(row for row in upload.rows if row["index"] == 1_000_049)
    assert gap["prediction"] is None
    assert has_note(upload.checks, ": 1000049")
    assert upload.format == "xlsx"


def test_the_workbook_opens_with_text_as_text(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    benchmark = one(tmp_path, {"index": 3, "question": "=1+1?", "B": "N/A"}, {"index": 4})
    upload = benchmark.submission([Answer(3, "=A\x00\n\u00e9"), Answer(4, "")])
    assert has_note(upload.checks, "cell", ": 3")
    book = openpyxl.load_workbook(io.BytesIO(xlsx_bytes(upload.rows)))
    assert book.sheetnames == ["Sheet1"]
    rows = list(book["Sheet1"].iter_rows())
    assert [cell.value for cell in rows[0]] == [
        "index", "question", "A", "B", "C", "D", "prediction", "answer", "split",
    ]  # fmt: skip
    assert [cell.value for cell in rows[1]] == [3, "=1+1?", "cat", None, None, None, "=A\n\u00e9", "A", "dev"]
    assert {rows[1][place].data_type for place in (1, 6)} == {"s"}
    assert rows[2][6].value in (None, "")


def test_without_openpyxl_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(MissingExtraError) as raised:
        xlsx_bytes([{"a": 1}])
    assert (raised.value.packages, raised.value.extra) == (("openpyxl",), "eval")


def test_a_split_without_answers_is_the_servers(tmp_path):
    benchmark = one(tmp_path, {"index": 3}, columns=[name for name in COLUMNS if name != "answer"])
    with refused("vila submit", file="mmbench_dev_20230712.tsv"):
        benchmark.score([Answer(3, "A")])
    assert "answer" not in benchmark.submission([Answer(3, "A")]).rows[0]


@pytest.mark.parametrize(
    ("rows", "mention", "record", "field"),
    [
        ([{"index": 3, "answer": ""}], "3 ('')", None, None),
        ([{"index": "x"}], "'x'", "row 1", "index"),
        ([{"index": 3}, {"index": 3}], "'3'", "row 2", "index"),
        ([{"index": 1_000_003}], "1,000,000", None, None),
        ([], "no rows", None, None),
    ],
    ids=["no answer", "no number", "twice", "rotations only", "empty"],
)
def test_invalid_rows_are_named(tmp_path, rows, mention, record, field):
    with refused(mention, file="mmbench_dev_20230712.tsv", record=record, field=field):
        one(tmp_path, *rows).score([Answer(3, "A"), Answer(1_000_003, "A")])


def test_another_release_is_named_by_its_columns(tmp_path):
    benchmark = one(tmp_path, {"index": 3}, columns=[name for name in COLUMNS if name not in ("hint", "comment")])
    with refused("hint", "index, question", file="mmbench_dev_20230712.tsv"):
        benchmark.items()
    with refused("hint, comment", file="mmbench_dev_20230712.tsv"):
        benchmark.submission([Answer(3, "A")])
    assert benchmark.score([Answer(3, "A")]).score == 100


def test_a_truncated_table_is_named(folder):
    path = folder / "mmbench" / "mmbench_dev_20230712.tsv"
    whole = path.read_text()
    path.write_text(whole[:-60])
    with pytest.raises(DataError) as caught:
        MmBench(folder).score(answers())
    assert (caught.value.file, caught.value.record) == (str(path), "line 28")
    # A quote that does not end would make all rows behind it the text of one cell.
    lines = whole.split("\n")
    lines[3] = lines[3].rpartition("\t")[0] + '\t"open'
    path.write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        MmBench(folder).score(answers())
    assert (caught.value.file, caught.value.record) == (str(path), "line 4")


def test_invalid_tables_are_named(tmp_path):
    path = tmp_path / "mmbench_dev_20230712.tsv"
    path.write_text("index,question\n1,What?\n")
    with refused(file=path.name, expected="a tab-separated table"):
        MmBench(tmp_path).items()
    path.write_bytes(b"index\tquestion\n1\t\xff\n")
    with refused("UTF-8", file=path.name, record="line 2"):
        MmBench(tmp_path).items()
    with refused("mmbench_dev_20230712.tsv", "openmmlab", field="mmbench"):
        MmBench(tmp_path / "nowhere")


def test_the_published_size_scores_and_converts(tmp_path):
    lines = [COLUMNS]
    for number in range(1094):
        lines += turns(number, ["a cat", "a dog", "a cow", "a pig"], 0)
    lines.append(turns(1094, ["a cat"], 0)[0])
    assert len(lines) == 4378
    (tmp_path / "mmbench_dev_20230712.tsv").write_text(table(lines))
    benchmark = MmBench(tmp_path)
    rows = [Answer(row[0], row[7] if row[0] % 2 else "A") for row in lines[1:]]
    result = benchmark.score(rows)
    assert result.score == pytest.approx(100 * 548 / 1095)  # odd questions, and the last, which has one rotation
    assert len(result.notes) == 1
    assert len(benchmark.submission(rows).rows) == 4377
    assert len(benchmark.items()) == 4377
