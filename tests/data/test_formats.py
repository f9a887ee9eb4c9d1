"""The contract of every format, over all of them and every container that they read."""

import copy
import datetime as dt
import json
import multiprocessing
import pickle

import pytest

from tests.data.good import CHAT, GOOD, RECORDS, TEXTS, VFLAN, mmc4
from tests.data.shards import PIXELS, refusal, write_lines, write_parquet, write_tar
from vila.core.errors import ConfigError, DataError, UnknownNameError
from vila.core.optional import MissingExtraError
from vila.core.types import Image, MediaRef, Text
from vila.data.formats.base import FORMATS, data_files
from vila.data.readers import parquet

CASES = pytest.mark.parametrize("case", GOOD, ids="-".join)
JSON_FORMATS = pytest.mark.parametrize("kind", RECORDS)


def opened(case, folder, **options):
    return FORMATS[case[0]].open(GOOD[case](folder), folder, **options)


def opened_lines(kind, rows, folder, **options):
    return FORMATS[kind].open(write_lines(folder / "d.jsonl", rows), folder, **options)


def test_every_format_has_good_data_here():
    assert {kind for kind, _ in GOOD} == set(FORMATS)


@CASES
def test_access_by_index_in_any_order_equals_going_through(case, tmp_path):
    source = opened(case, tmp_path)
    samples = list(source)
    assert len(samples) == len(source) >= 3
    assert [source[number] for number in reversed(range(len(source)))] == samples[::-1]
    assert len({sample.id for sample in samples}) == len(samples)
    assert all(sample.messages for sample in samples)
    for number in (-1, len(source)):
        with pytest.raises(IndexError):
            source[number]


@CASES
def test_a_source_travels_to_another_process(case, tmp_path):
    source = opened(case, tmp_path)
    packed = pickle.dumps(source)
    assert len(packed) < 5000
    assert list(pickle.loads(packed)) == list(source)
    assert pickle.loads(pickle.dumps(source[0])) == source[0]
    assert hash(source[0]) == hash(pickle.loads(packed)[0])


def _samples(source):
    return list(source)


def test_a_source_works_in_a_spawned_process(tmp_path):
    source = opened(("coyo", "tar"), tmp_path)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(list, [source]) == [list(source)]


def test_sources_work_in_processes_that_fork_while_files_are_open(tmp_path):
    sources = []
    for case in GOOD:
        folder = tmp_path / "-".join(case)
        folder.mkdir()
        sources.append(opened(case, folder))
    expected = [list(source) for source in sources]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_samples, sources) == expected


@CASES
def test_media_are_references_that_are_not_opened(case, tmp_path):
    # None of the files that records name exists.
    for sample in opened(case, tmp_path):
        for item in sample.media:
            if isinstance(item.source, MediaRef):
                assert str(tmp_path) in item.source.name
                assert item.source.read() in (PIXELS, b"clip")
            else:
                assert tmp_path in item.source.parents


@CASES
def test_files_of_a_directory_are_one_source_in_the_order_of_their_names(case, tmp_path):
    path = GOOD[case](tmp_path)
    alone = list(FORMATS[case[0]].open(path, tmp_path))
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("b", "a"):
        (folder / f"{name}{path.suffix}").write_bytes(path.read_bytes())
    (folder / ".hidden.json").write_text("x")
    (folder / "notes.txt").write_text("x")
    both = FORMATS[case[0]].open(folder, tmp_path)
    assert [sample.messages for sample in map(_without_media, both)] == [
        sample.messages for sample in map(_without_media, alone * 2)
    ]
    assert both[0].media[:1] == () or "b" not in str(both[0].media[0].source).rpartition("/")[2].partition(".")[0]
    assert list(FORMATS[case[0]].open(folder / f"[ab]{path.suffix}", tmp_path)) == list(both)


def _without_media(sample):
    messages = tuple(
        type(message)(message.role, tuple(part for part in message.parts if isinstance(part, Text)))
        for message in sample.messages
    )
    return type(sample)("", messages)


class RecordingEvents:
    def __init__(self):
        self.tasks = []

    def started(self, task, total=None, unit=""):
        self.tasks.append((task, unit))

    def advanced(self, task, amount=1, **facts): ...
    def log(self, text): ...
    def finished(self, task, summary=""): ...


@CASES
def test_indexing_is_reported_once(case, tmp_path):
    path, events = GOOD[case](tmp_path), RecordingEvents()
    for _ in range(2):
        FORMATS[case[0]].open(path, tmp_path, events)
    assert events.tasks == [(f"index {path.name}", "bytes")]


@CASES
def test_unknown_options_are_an_error(case, tmp_path):
    with pytest.raises(ConfigError) as caught:
        opened(case, tmp_path, max_imges=3)
    assert case[0] in str(caught.value) and "max_imges" in caught.value.problem


def test_options_of_the_wrong_type_or_choice_are_an_error(tmp_path):
    with pytest.raises(ConfigError) as caught:
        opened(("mmc4", "jsonl"), tmp_path, max_images="6", place="top")
    named = [(problem.field, problem.value) for problem in caught.value.problems]
    assert named == [("options.max_images", "6"), ("options.place", "top")]


@CASES
def test_a_missing_file_is_an_error(case, tmp_path):
    suffix = GOOD[case](tmp_path).suffix
    (tmp_path / "empty").mkdir()
    for name in (f"none{suffix}", "none-*.x", "empty"):
        error = refusal(lambda name=name: FORMATS[case[0]].open(tmp_path / name, tmp_path))
        assert error.file == str(tmp_path / name)


@pytest.mark.parametrize("name", ["d.tar.gz", "d.tgz", "d.tar.zst", "d.jsonl.gz", "d.pkl", "d.csv"])
@pytest.mark.parametrize("kind", FORMATS)
def test_other_file_types_are_an_error_with_a_hint(kind, name, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    error = refusal(lambda: FORMATS[kind].open(tmp_path / name, tmp_path))
    assert error.file == str(tmp_path / name) and error.hint
    assert ("compressed" in error.problem) == (name.rpartition(".")[2] in ("gz", "tgz", "zst"))


@CASES
def test_a_file_that_changes_while_it_is_read_is_an_error(case, tmp_path):
    source = opened(case, tmp_path)
    path = GOOD[case](tmp_path)
    path.write_bytes(path.read_bytes() + b" ")
    parquet._reset_after_fork()  # a decoded column may stay in use
    assert refusal(lambda: source[0]).file == str(path)


@CASES
def test_a_cut_file_is_an_error(case, tmp_path):
    path = GOOD[case](tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    error = refusal(lambda: list(FORMATS[case[0]].open(path, tmp_path)))
    assert error.file == str(path) and error.hint


def _damaged(record):
    """The record with each value inside it replaced by something else, one at a time."""
    places = [()]
    while places:
        place = places.pop()
        value = record
        for key in place:
            value = value[key]
        if isinstance(value, (dict, list)):
            places += [(*place, key) for key in (value if isinstance(value, dict) else range(len(value)))]
        if not place:
            continue
        for other in (None, 3, -1.5, True, "x", "", [], {}, [None], [[]], {"a": 1}, ["x", 2]):
            copied = copy.deepcopy(record)
            holder = copied
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = other
            yield copied
        copied = copy.deepcopy(record)
        holder = copied
        for key in place[:-1]:
            holder = holder[key]
        del holder[place[-1]]
        yield copied


@JSON_FORMATS
def test_any_wrong_value_in_a_record_is_an_error_with_the_record(kind, tmp_path):
    rows = [row for record in RECORDS[kind] for row in _damaged(record)]
    source = opened_lines(kind, rows, tmp_path)
    refused = 0
    for number in range(len(source)):
        try:
            source[number]
        except DataError as error:
            refused += 1
            assert (error.file, error.record) == (str(tmp_path / "d.jsonl"), number), rows[number]
            assert error.field, (rows[number], str(error))
    assert refused > len(rows) / 4


def _renamed(kind, name):
    text = json.dumps(RECORDS[kind])
    return json.loads(text.replace('"p.png"', json.dumps(name)).replace('"v.mp4"', json.dumps(name)))


@JSON_FORMATS
@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../x.png", "link/x.png"])
def test_a_file_outside_the_image_root_is_an_error(kind, name, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    rows = [row for row in _renamed(kind, name) if name in json.dumps(row)]
    path = write_lines(tmp_path / "d.jsonl", rows)
    assert rows or kind == "flan"
    for number in range(len(rows)):
        if kind == "vflan" and name == "/etc/passwd":
            continue  # not the name of an image, so base64
        error = refusal(lambda number=number: FORMATS[kind].open(path, root)[number])
        assert (error.file, error.record) == (str(path), number)
        assert error.field and (error.value, error.expected) == (name, f"a path in {root}")


@JSON_FORMATS
def test_an_absolute_path_inside_the_image_root_is_accepted(kind, tmp_path):
    name = str(tmp_path / "p.png")
    for sample in opened_lines(kind, _renamed(kind, name), tmp_path):
        assert all(isinstance(item.source, MediaRef) or item.source.is_absolute() for item in sample.media)


@JSON_FORMATS
def test_urls_are_an_error(kind, tmp_path):
    rows = [row for row in _renamed(kind, "http://example.org/p.png") if "http://" in json.dumps(row)]
    for number in range(len(rows)):
        error = refusal(lambda number=number: opened_lines(kind, rows, tmp_path)[number])
        assert error.record == number and error.field
        assert str(error.value).startswith("http://") and error.hint


@JSON_FORMATS
def test_a_text_of_100_000_characters_with_separators_is_unchanged(kind, tmp_path):
    long = ("</s> USER: ### <|im_end|> [INST] \\n \u4e2d " * 3000)[:100_000].rstrip()
    text = json.dumps(RECORDS[kind][0])
    for short in ("A cat.", "A cat.\n", "s0"):
        text = text.replace(json.dumps(short), json.dumps(long))
    record = json.loads(text)
    if kind == "flan":
        record["answer"] = long
    sample = opened_lines(kind, [record], tmp_path)[0]
    assert any(long in message.text for message in sample.messages)


def test_a_repeated_key_is_an_error(tmp_path):
    (tmp_path / "d.jsonl").write_text(
        '{"question": "a", "answer": "b"}\n{"question": "a", "question": "c", "answer": "b"}\n'
    )
    source = FORMATS["flan"].open(tmp_path / "d.jsonl", tmp_path)
    assert source[0].messages[0].text == "a"
    error = refusal(lambda: source[1])
    assert (error.record, "'question'" in error.problem) == (1, True)


def test_a_directory_has_its_shards_and_not_the_json_files_with_them(tmp_path):
    write_tar(tmp_path / "s-0.tar", [("a.txt", "x")])
    write_lines(tmp_path / "index.json", [{}])
    assert data_files(tmp_path, (".tar", ".parquet", ".jsonl", ".json")) == [tmp_path / "s-0.tar"]
    write_lines(tmp_path / "t-0.jsonl", [{}])
    assert data_files(tmp_path, (".parquet", ".jsonl", ".json")) == [tmp_path / "t-0.jsonl"]


def test_a_parquet_source_caches_few_columns_and_reads_only_those_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "CACHE_BYTES", 1)
    rows = [{"image": PIXELS * 100, "text": f"t{n}", "other": "x" * 1000} for n in range(40)]
    source = FORMATS["coyo"].open(write_parquet(tmp_path / "d.parquet", rows, group=4), tmp_path)
    parquet._reset_after_fork()
    assert [source[n].messages[0].text for n in (39, 0, 17)] == ["t39", "t0", "t17"]
    assert source[5].media[0].source.read() == PIXELS * 100
    assert {key[3] for key in parquet._DECODED._columns} <= {"image", "text"}
    assert len(parquet._DECODED._columns) == 2


def test_missing_pyarrow_is_an_error_with_a_hint(tmp_path, monkeypatch):
    import sys

    path = write_parquet(tmp_path / "d.parquet", [{"inputs": "a", "targets": "b"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError) as raised:
        FORMATS["flan"].open(path, tmp_path)
    assert raised.value.hint == "pip install pyarrow"


def test_media_references_have_names_with_file_and_record(tmp_path):
    image = opened(("coyo", "tar"), tmp_path)[1].media[0]
    assert image == Image(image.source)
    assert image.name == f"{tmp_path / 'd.tar'} b.jpg"
    row = opened(("coyo", "parquet"), tmp_path)[1].media[0]
    assert row.name == f"{tmp_path / 'd.parquet'}, record 1, image"
    inline = opened(("mmc4", "jsonl"), tmp_path)[0].media[0]
    assert inline.name == f"{tmp_path / 'd.jsonl'}, record 0, image_info[0].image_base64"


def test_an_unknown_format_suggests_a_near_one():
    with pytest.raises(UnknownNameError) as caught:
        FORMATS["message"]
    assert "messages" in caught.value.near


ANSWERED = {"role": "assistant", "content": "A cat."}
IN_SHARDS = {
    "mmc4": [mmc4(file="0.jpg"), {"text_list": TEXTS}],
    "vflan": [{**VFLAN[0], "image": ["0.jpg"]}, VFLAN[2]],
    "webdataset": [
        {"messages": [{"role": "user", "content": [{"type": "image", "file": "0.jpg"}, "What?"]}, ANSWERED]},
        {"messages": [{"role": "user", "content": "<image>What?"}, ANSWERED], "images": ["0.jpg"]},
        {"question": "What?", "answer": "A cat.", "image": ["0.jpg"]},
        {"caption": "A cat runs."},
    ],
}


@pytest.mark.parametrize("kind", IN_SHARDS)
def test_any_wrong_value_in_a_record_of_a_shard_is_an_error_with_the_key(kind, tmp_path):
    rows = [row for record in IN_SHARDS[kind] for row in _damaged(record)]
    members = [one for n, row in enumerate(rows) for one in ((f"k{n}.0.jpg", PIXELS), (f"k{n}.json", json.dumps(row)))]
    path = write_tar(tmp_path / "d.tar", members)
    source = FORMATS[kind].open(path, tmp_path)
    refused = 0
    for number in range(len(source)):
        try:
            source[number]
        except DataError as error:
            refused += 1
            assert (error.file, error.record) == (str(path), f"key k{number}"), rows[number]
            assert error.field or error.value == ["0.jpg", "json"], (rows[number], str(error))
    assert refused > len(rows) / 4


COLUMNS = {
    "messages": ("messages", "conversations", "images", "branches", "template", "id"),
    "vflan": ("question", "answer", "image", "id"),
    "flan": ("inputs", "targets", "id"),
    "interleaved": ("texts", "images", "id"),
    "cauldron": ("texts", "images", "id"),
    "coyo": ("image", "text", "id"),
}
GOOD_ROWS = {
    "messages": {"messages": CHAT, "id": "a"},
    "vflan": {"question": "q", "answer": "a", "id": "a"},
    "flan": {"inputs": "q", "targets": "a", "id": "a"},
    "interleaved": {"texts": ["a", None], "images": [None, {"bytes": PIXELS}], "id": "a"},
    "cauldron": {"texts": [{"user": "q", "assistant": "a"}], "images": [], "id": "a"},
    "coyo": {"image": PIXELS, "text": "t", "id": "a"},
}


@pytest.mark.parametrize(("kind", "column"), [(kind, column) for kind, names in COLUMNS.items() for column in names])
@pytest.mark.parametrize(
    "value", [3, 2.5, True, "text", b"\xff\x00", [3], ["x"], [[["x"]]], {"a": 1}, [{"a": None}], dt.date(2026, 1, 1)]
)
def test_a_column_of_the_wrong_type_is_an_error_with_the_column(kind, column, value, tmp_path):
    row = {**GOOD_ROWS[kind], column: value}
    if column == "conversations":
        del row["messages"]
    path = write_parquet(tmp_path / "d.parquet", [row] * 2)
    source = FORMATS[kind].open(path, tmp_path)
    try:
        assert source[1].messages
    except DataError as error:
        assert (error.file, error.record) == (str(path), 1)
        assert error.field
