"""`vila run --batch-file`: answers in the order of the records; an invalid record is an error before the start."""

import json

import pytest

from vila.cli import run
from vila.core.errors import MediaError
from vila.core.types import Image, Message
from vila.engine.engine import Engine

NEW = ("--max-new-tokens", 5, "--dtype", "float32")
TURNS = [
    {"role": "user", "content": [{"type": "image", "path": "p.png"}, {"type": "text", "text": "one?"}]},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
]
ROWS = [
    {"id": "a", "prompt": "what?", "image": "p.png"},
    {"id": 7, "messages": TURNS},
    {"prompt": "no image"},
    {"id": "b", "prompt": "<image> and <image>", "images": ["p.png", "p.png"]},
]


@pytest.fixture
def rows(tmp_path, image):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n")
    return path


@pytest.mark.parametrize("size", [1, 3])
def test_answers_come_in_the_order_of_the_rows(vila, model, image, rows, monkeypatch, size):
    monkeypatch.chdir("/")
    code, out, err = vila("run", model, "--batch-file", rows, "--batch-size", size, *NEW)
    assert code == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    p = Image(image)
    conversations = [
        [Message.of("user", p, "what?")],
        [Message.of("user", p, "one?"), Message.of("assistant", "1"), Message.of("user", "two?")],
        [Message.of("user", "no image")],
        [Message.of("user", p, " and ", p)],
    ]
    expected = Engine.load(model, dtype="float32").complete(conversations, max_new_tokens=5)
    assert [list(row) for row in answers] == [["id", "text", "finish", "prompt_tokens", "tokens"]] * 4
    assert [row["id"] for row in answers] == ["a", 7, 5, "b"]
    assert [row["text"] for row in answers] == [answer.text for answer in expected]
    assert [row["prompt_tokens"] for row in answers] == [answer.prompt_tokens for answer in expected]


def test_out_holds_what_standard_output_would(vila, model, rows, tmp_path):
    _, printed, _ = vila("run", model, "--batch-file", rows, *NEW)
    code, out, _ = vila("run", model, "--batch-file", rows, "--output", tmp_path / "new" / "out.jsonl", *NEW)
    assert (code, out) == (0, "")
    assert (tmp_path / "new" / "out.jsonl").read_text() == printed


def test_out_stays_as_it_was_when_a_later_batch_fails(vila_error, model, rows, tmp_path, monkeypatch):
    target = tmp_path / "out.jsonl"
    target.write_text("older\n")
    complete, calls = Engine.complete, []

    def second_fails(engine, conversations, sampling):
        calls.append(len(conversations))
        if len(calls) == 2:
            raise MediaError("gone", file="http://x/y.png")
        return complete(engine, conversations, sampling)

    monkeypatch.setattr(Engine, "complete", second_fails)
    error = vila_error("run", model, "--batch-file", rows, "--batch-size", 2, "--output", target, *NEW)
    assert (error.exit_code, error.file, error.record) == (1, str(rows), "line 5 to 7")
    assert "http://x/y.png" in error.problem
    assert target.read_text() == "older\n"
    assert calls == [2, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "p.png", "rows.jsonl"]


def test_shots_and_system_text_precede_every_record(vila, model, tmp_path):
    path = tmp_path / "two.jsonl"
    path.write_text('{"prompt": "a?"}\n{"prompt": "bb?"}\n')
    code, out, _ = vila("run", model, "--batch-file", path, "--shot", "text=no", "question=yes?", "--system", "s", *NEW)
    assert code == 0
    shared = len("syes? no") + 1
    assert [json.loads(line)["prompt_tokens"] - shared for line in out.splitlines()] == [2, 3]


def test_truncation_is_counted_in_each_sequence(vila, model, tmp_path):
    path = tmp_path / "long.jsonl"
    said = [{"role": "user", "content": "q" * 510}, {"role": "assistant", "content": "1"}]
    path.write_text(json.dumps({"messages": [*said, {"role": "user", "content": "x"}]}) + '\n{"prompt": "y"}\n')
    assert vila("run", model, "--batch-file", path, *NEW)[0] == 1
    code, out, _ = vila("run", model, "--batch-file", path, "--truncate", *NEW)
    assert code == 0
    assert [json.loads(line)["dropped_messages"] for line in out.splitlines()] == [2, 0]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ("{oops", None),
        ("[1]", None),
        ('{"prompt": "\xff"}', None),
        ('{"prompt": "\\ud800"}', None),
        ('{"id": ' + "1" * 5000 + "}", None),
        ('{"prompt": "x", "imgae": "p.png"}', "imgae"),
        ('{"id": "x"}', None),
        ('{"prompt": "x", "messages": []}', None),
        ('{"messages": [], "image": "p.png"}', "image"),
        ('{"prompt": 3}', "prompt"),
        ('{"prompt": ""}', "prompt"),
        ('{"prompt": " \\n"}', "prompt"),
        ('{"prompt": "x", "id": [1]}', "id"),
        ('{"prompt": "x", "id": true}', "id"),
        ('{"prompt": "x", "images": ["p.png", 3]}', "images"),
        ('{"prompt": "x", "image": "p.png", "images": ["p.png"]}', "image"),
        ('{"prompt": "x", "image": "none.png"}', None),
        ('{"prompt": "x", "image": "page.png"}', None),
        ('{"prompt": "x", "video": "none.mp4"}', None),
        ('{"prompt": "<image> <image>", "image": "p.png"}', "prompt"),
        ('{"prompt": "<image> what?"}', "prompt"),
        ('{"messages": []}', "messages"),
        ('{"messages": [{"role": "user", "content": ""}]}', "messages"),
        ('{"messages": [{"role": "user", "content": [{"type": "text", "text": " "}]}]}', "messages"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "messages[0]"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "messages[0].role"),
        ('{"prompt": "' + "x" * 600 + '"}', None),
    ],
)
def test_a_bad_record_is_an_error_before_weights_are_read(vila_error, model, image, tmp_path, monkeypatch, row, field):
    (tmp_path / "page.png").write_text("<!DOCTYPE html>")
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "good"}\n' + row.encode("latin-1") + b"\n")

    def read_weights(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(run, "load_engine", read_weights)
    error = vila_error("run", model, "--batch-file", path)
    assert (error.file, error.record, error.field) == (str(path), "line 2", field)


def test_a_record_may_have_an_image_without_text(vila, model, image, tmp_path):
    path = tmp_path / "rows.jsonl"
    parts = [{"type": "image", "path": "p.png"}]
    rows = [{"prompt": "", "image": "p.png"}, {"messages": [{"role": "user", "content": parts}]}]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    code, out, _ = vila("run", model, "--batch-file", path, *NEW)
    assert code == 0
    assert [json.loads(line)["prompt_tokens"] for line in out.splitlines()] == [4, 4]


@pytest.mark.parametrize(
    ("arguments", "code", "where"),
    [
        (("--batch-file", "{tmp}/none.jsonl"), 1, "{tmp}/none.jsonl"),
        (("--batch-file", "{tmp}/empty.jsonl"), 1, "{tmp}/empty.jsonl"),
        (("--batch-file", "{tmp}/rows.jsonl", "--output", "{tmp}/rows.jsonl"), 2, "--output"),
        (("--batch-file", "{tmp}/rows.jsonl", "--output", "{tmp}"), 2, "--output"),
        (("--batch-file", "{tmp}/rows.jsonl", "-i", "p.png"), 2, "--image"),
        (("--batch-file", "{tmp}/rows.jsonl", "--shot", "text=a"), 1, "{tmp}/rows.jsonl, line 3"),
    ],
)
def test_flags_that_do_not_combine_with_a_batch_file_are_refused(
    vila_error, model, rows, tmp_path, arguments, code, where
):
    (tmp_path / "empty.jsonl").write_text("\n")
    error = vila_error("run", model, *(argument.format(tmp=tmp_path) for argument in arguments))
    found = ", ".join(filter(None, (error.file, error.record))) or error.field
    assert (error.exit_code, found) == (code, where.format(tmp=tmp_path))
    assert len(rows.read_text().split("\n\n")) == len(ROWS)


def test_ctrl_c_names_the_file_that_was_not_written(vila_error, model, rows, tmp_path, monkeypatch):
    def press(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "complete", press)
    target = tmp_path / "out.jsonl"
    error = vila_error("run", model, "--batch-file", rows, "--output", target, *NEW)
    assert (error.exit_code, error.file) == (130, str(target))
    assert not target.exists()
