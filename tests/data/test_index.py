"""An index finds every record of a file, detects a changed file, and reports where a file is damaged."""

import json
import multiprocessing
import os
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.shards import refusal, write_lines, write_list, write_tar
from tests.pages import numbers
from vila.core.errors import DataError
from vila.data.readers import index
from vila.data.readers import json as scanner
from vila.data.readers.index import MAX_OPEN, file_version, open_index, read_span
from vila.data.readers.json import parse_record, scan_json
from vila.data.readers.tar import read_members, scan_tar


class CountingEvents:
    """Count reported tasks and bytes."""

    def __init__(self):
        self.builds, self.bytes = 0, 0

    def started(self, task, total=None, unit=""):
        self.builds += 1

    def advanced(self, task, amount=1, **facts):
        self.bytes += amount

    def log(self, text): ...
    def finished(self, task, summary=""): ...


def spans(path):
    return [(int(a), int(b)) for rows in scan_json(path, lambda amount: None) for a, b in rows]


def records(path):
    content = path.read_bytes()
    return [json.loads(content[a : a + b]) for a, b in spans(path)]


AWKWARD = [
    {"text": 'a "quoted" \\ back\\\\slash \\" ], [ } { ,', "n": {"deep": [[1, 2], {"x": "]}"}]}},
    {},
    {"text": "\\" * 7 + '"', "id": "\u00e9\u4e2d\U0001f600"},
    {"a": [], "b": "", "c": "\n\t"},
]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("how", [{}, {"indent": 2}, {"ensure_ascii": False}])
def test_a_list_is_split_into_records_for_every_block_size(block, how, tmp_path, monkeypatch):
    monkeypatch.setattr(scanner, "BLOCK", block)
    assert records(write_list(tmp_path / "a.json", AWKWARD, **how)) == AWKWARD


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
def test_lines_are_split_for_every_block_size_and_blank_lines_are_skipped(block, tmp_path, monkeypatch):
    monkeypatch.setattr(scanner, "BLOCK", block)
    path = tmp_path / "a.jsonl"
    path.write_text("\n  \n".join(map(json.dumps, AWKWARD)) + "\r\n\r\n", encoding="utf-8")
    assert records(path) == AWKWARD
    path.write_text("\ufeff" + json.dumps({"a": 1}), encoding="utf-8")
    assert records(path) == [{"a": 1}]


_VALUES = st.recursive(
    st.none() | st.integers() | st.text(alphabet='"\\[]{},: \u00e9a', max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='"\\]a', max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(max_size=3), _VALUES, max_size=3), max_size=5), block=st.integers(1, 40))
def test_any_list_is_split_as_json_loads_parses_it(rows, block, tmp_path_factory):
    path = write_list(tmp_path_factory.mktemp("any") / "a.json", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scanner, "BLOCK", block)
        assert records(path) == rows


@pytest.mark.parametrize("text", ["[]", " [ ] \n", "", "\n\n"])
def test_a_file_without_records_has_no_spans(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    assert spans(tmp_path / "a.json") == []


@pytest.mark.parametrize("at", range(1, 60, 7))
def test_a_cut_list_is_an_error_with_the_byte(at, tmp_path):
    path = write_list(tmp_path / "a.json", AWKWARD)
    path.write_bytes(path.read_bytes()[:at])
    error = refusal(lambda: spans(path))
    assert error.file == str(path) and f"byte {at}," in error.problem and error.hint


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"a": 1}, 3]', 1),
        ('[{"a": 1},]', [1, 1]),
        ('[{"a": 1} {"a": 2}]', [2, 0]),
        ('[{"a": 1}] {"b": 2}', "one list"),
        ('[{"a": 1}]]', "one list"),
    ],
)
def test_a_list_that_is_not_of_objects_is_an_error(text, problem, tmp_path):
    (tmp_path / "a.json").write_text(text)
    error = refusal(lambda: spans(tmp_path / "a.json"))
    assert error.file == str(tmp_path / "a.json")
    # The element that is no object, the numbers of objects and of commas, or what was expected.
    assert problem in (error.record, error.expected, numbers(error.problem))


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a": 1, "b": 2, "a": 3}',
        b'{"x": {"a": 1, "a": 1}}',
        b'{"a": ',
        b'{"a": "\xff"}',
        b'{"a": ' + b"1" * 5000 + b"}",
        b"[1]",
        b"[" * 100_000,
        b'{"a": "cut \\ud83d"}',
    ],
    ids=["repeated", "repeated inside", "cut", "not UTF-8", "too many digits", "list", "too deep", "surrogate"],
)
def test_a_record_that_is_not_a_valid_object_is_an_error(raw):
    error = refusal(lambda: parse_record(raw, Path("d.jsonl"), 7))
    assert (error.file, error.record) == ("d.jsonl", 7)


def test_an_index_is_built_once_and_again_if_the_file_changes(tmp_path):
    path, events = write_lines(tmp_path / "a.jsonl", [{"n": n} for n in range(10)]), CountingEvents()
    first = open_index(path, "json", scan_json, events)
    assert len(first) == 10 and events.builds == 1 and events.bytes == path.stat().st_size
    assert len(open_index(path, "json", scan_json, events)) == 10 and events.builds == 1
    write_lines(path, [{"n": n} for n in range(100, 112)])
    again = open_index(path, "json", scan_json, events)
    assert len(again) == 12 and events.builds == 2
    assert parse_record(read_span(path, *again[11]), path, 11) == {"n": 111}
    assert np.array_equal(again.table(), [again[number] for number in range(12)])


def test_a_file_of_the_same_size_but_another_time_is_indexed_again(tmp_path):
    path, events = write_lines(tmp_path / "a.jsonl", [{"n": 1}, {"n": 22}]), CountingEvents()
    open_index(path, "json", scan_json, events)
    write_lines(path, [{"n": 11}, {"n": 2}])
    os.utime(path, ns=(1, 1))
    index = open_index(path, "json", scan_json, events)
    assert events.builds == 2
    assert parse_record(read_span(path, *index[0]), path, 0) == {"n": 11}


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-3], lambda raw: raw[:100], lambda raw: b"x" + raw[1:], lambda raw: b""]
)
def test_a_damaged_index_is_built_again(damage, tmp_path, own_cache):
    path = write_lines(tmp_path / "a.jsonl", [{"n": n} for n in range(3)])
    expected = open_index(path, "json", scan_json).table()
    (file,) = (own_cache / "index").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert np.array_equal(open_index(path, "json", scan_json).table(), expected)


def test_a_failed_scan_leaves_no_index(tmp_path, own_cache):
    path = write_list(tmp_path / "a.json", AWKWARD)
    path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(DataError):
            open_index(path, "json", scan_json)
    assert list((own_cache / "index").iterdir()) == []


def _opened(path):
    index = open_index(path, "json", scan_json)
    return [index[number] for number in range(len(index))]


def test_concurrent_processes_build_the_same_index(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"n": n} for n in range(500)])
    with multiprocessing.get_context("fork").Pool(4) as pool:
        results = pool.map(_opened, [path] * 8, chunksize=1)
    assert all(result == results[0] for result in results) and len(results[0]) == 500


def test_a_number_outside_the_range_is_an_index_error(tmp_path):
    index = open_index(write_lines(tmp_path / "a.jsonl", [{}]), "json", scan_json)
    for number in (-1, 1):
        with pytest.raises(IndexError):
            index[number]


def test_an_index_is_small_when_pickled(tmp_path):
    index = open_index(write_lines(tmp_path / "a.jsonl", [{"n": n} for n in range(5000)]), "json", scan_json)
    packed = pickle.dumps(index)
    assert len(packed) < 2000
    assert pickle.loads(packed)[4999] == index[4999]


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"n": n} for n in range(3)])
    index = open_index(path, "json", scan_json)
    read_span(path, *index[0], index.version)
    with path.open("a") as stream:
        stream.write('{"n": 3}\n')
    assert refusal(lambda: read_span(path, *index[0], index.version)).file == str(path)


def test_a_cut_or_removed_file_is_an_error(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"0123456789")
    error = refusal(lambda: read_span(path, 5, 10))
    assert error.file == str(path) and "5 bytes" in error.problem
    path.unlink()
    index._handle.cache_clear()
    assert refusal(lambda: read_span(path, 0, 1)).file == str(path)
    assert refusal(lambda: file_version(tmp_path)).file == str(tmp_path)


def test_at_most_max_open_files_are_open(tmp_path):
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        pytest.skip("needs /proc")
    before = len(list(folder.iterdir()))
    for number in range(3 * MAX_OPEN):
        (tmp_path / f"{number}").write_bytes(b"%06d" % number)
    for number in (n for _ in range(2) for n in range(3 * MAX_OPEN)):
        assert read_span(tmp_path / f"{number}", 0, 6) == b"%06d" % number
    assert len(list(folder.iterdir())) <= before + MAX_OPEN


def test_threads_read_more_files_than_can_stay_open(tmp_path):
    for number in range(2 * MAX_OPEN):
        (tmp_path / f"{number}").write_bytes(b"%06d" % number * 100)

    def read_all(seed):
        order = random.Random(seed).sample(range(2 * MAX_OPEN), 2 * MAX_OPEN)
        return all(read_span(tmp_path / f"{number}", 60, 60) == b"%06d" % number * 10 for number in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read_all, range(16)))


def test_a_long_path_of_any_characters_fits_the_header(tmp_path):
    folder = tmp_path
    for _ in range(6):
        folder = folder / ("\U0001f600" * 60)
    folder.mkdir(parents=True)
    path = write_lines(folder / "a.jsonl", [{"n": n} for n in range(5)])
    index = open_index(path, "json", scan_json)
    assert parse_record(read_span(path, *index[0]), path, 0) == {"n": 0}


GOOD = [
    ("a/x.0.jpg", b"1"),
    ("a/x.json", {"n": 1}),
    ("a/y.jpg", b"2" * 600),
    ("b/x.tar.txt", "t"),
    ("b/long" + "l" * 200 + ".txt", "u"),
]


def tar_spans(path):
    return [tuple(map(int, row)) for rows in scan_tar(path, lambda amount: None) for row in rows]


def test_a_shard_has_its_samples_in_order(tmp_path):
    path = write_tar(tmp_path / "s.tar", GOOD)
    stamp = file_version(path)
    samples = [read_members(path, *span, stamp) for span in tar_spans(path)]
    assert [key for key, _ in samples] == ["a/x", "a/y", "b/x", "b/long" + "l" * 200]
    assert [[member.extension for member in members] for _, members in samples] == [
        ["0.jpg", "json"],
        ["jpg"],
        ["tar.txt"],
        ["txt"],
    ]
    contents = [read_span(path, member.offset, member.size) for _, members in samples for member in members]
    assert contents == [b"1", b'{"n": 1}', b"2" * 600, b"t", b"u"]


def test_files_without_a_sample_are_ignored(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("README", "r"), ("x.txt", "1"), (".x.txt", "h"), ("./y.txt", "2")])
    assert [read_members(path, *span, file_version(path))[0] for span in tar_spans(path)] == ["x", "y"]


def test_a_shard_cut_anywhere_is_an_error(tmp_path):
    path = write_tar(tmp_path / "s.tar", GOOD)
    whole = path.read_bytes()
    last = max(
        member.offset + member.size
        for span in tar_spans(path)
        for member in read_members(path, *span, file_version(path))[1]
    )
    for end in random.Random(0).sample(range(1, last), 25):
        path.write_bytes(whole[:end])
        error = refusal(lambda: tar_spans(path))
        assert error.file == str(path) and error.hint
    path.write_bytes(whole[: 512 * 2 + 512 * 2 + 100])
    assert refusal(lambda: tar_spans(path)).record == "member 'a/x.json'"


def test_a_shard_cut_inside_a_member_is_an_error_with_the_member(tmp_path):
    path = write_tar(tmp_path / "s.tar", GOOD[:3])
    path.write_bytes(path.read_bytes()[: 5 * 512 + 10])
    assert refusal(lambda: tar_spans(path)).record == "member 'a/y.jpg'"


@pytest.mark.parametrize(
    ("members", "record"),
    [
        ([("x.jpg", b""), ("y.jpg", b""), ("x.txt", "")], "member 'x.txt'"),
        ([("x.jpg", b"1"), ("x.jpg", b"2")], "member 'x.jpg'"),
    ],
)
def test_members_that_do_not_form_samples_are_an_error(members, record, tmp_path):
    path = write_tar(tmp_path / "s.tar", members)
    error = refusal(lambda: tar_spans(path))
    assert (error.file, error.record) == (str(path), record)
