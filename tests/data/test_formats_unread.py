"""Media under keys that a format does not read: an error if the sample has no media, else counted."""

import json

import pytest

from tests.data.good import GOOD
from tests.data.shards import PIXELS, TEXT64, refusal, write_lines, write_parquet, write_tar
from vila.data.dataset import Split, Subset
from vila.data.formats.base import FORMATS

TURNS = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "x"}]
SAID = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "x"}]
TEXT = {
    "messages": {"messages": SAID},
    "llava_json": {"conversations": TURNS},
    "llava_json_v15": {"conversations": TURNS},
    "flan": {"question": "q", "answer": "a"},
    "vflan": {"question": "q", "answer": "a"},
    "cauldron": {"texts": [{"user": "q", "assistant": "a"}]},
    "interleaved": {"texts": ["a"], "images": [None]},
    "mmc4": {"text_list": ["a"]},
}
"""A text-only record of every format that has such records."""
OTHER = {
    "messages": ["image_path", "Image", "pictures", "frames", "img_url", "audios"],
    "llava_json": ["images", "image_path", "Image", "videos", "photo"],
    "llava_json_v15": ["images", "image_path", "Image", "videos", "video_path"],
    "flan": ["image", "images", "video", "file_name"],
    "vflan": ["Images", "image_path", "video"],
    "cauldron": ["image", "Images", "image_paths"],
    "interleaved": ["image", "image_urls"],
    "mmc4": ["images", "image"],
}


def lines(kind, rows, folder):
    return FORMATS[kind].open(write_lines(folder / "d.jsonl", rows), folder)


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in OTHER.items() for key in keys])
def test_a_text_only_record_with_media_under_another_key_is_an_error(kind, key, tmp_path):
    for value in ("0.png", ["0.png"], [{"path": "0.png", "bytes": None}]):
        error = refusal(lambda value=value: lines(kind, [TEXT[kind], {**TEXT[kind], key: value}], tmp_path)[1])
        assert (error.file, error.record, error.field) == (str(tmp_path / "d.jsonl"), 1, key)
        assert error.value == value and error.hint


@pytest.mark.parametrize("kind", TEXT)
@pytest.mark.parametrize(
    "other",
    [
        {"image": None, "images": [], "video": "", "image_path": {}} | {"frames": [None, {"bytes": None}]},
        {"image_id": "000123", "image_size": [3, 4], "has_image": True, "num_frames": 8, "image_caption": "a cat"},
        {"source": "https://example.org/page", "path": "docs/readme", "meta": {"pages": 3}, "imagenet_label": "cat"},
    ],
)
def test_keys_without_media_are_not_an_error(kind, other, tmp_path):
    record = {**other, **TEXT[kind]}
    if kind != "interleaved":
        assert lines(kind, [record], tmp_path)[0].media == ()


@pytest.mark.parametrize("kind", ["messages", "llava_json", "cauldron"])
@pytest.mark.parametrize("key", ["image", "images", "video"])
def test_media_inside_a_turn_are_an_error_too(kind, key, tmp_path):
    record = json.loads(json.dumps(TEXT[kind]))
    (name,) = record
    record[name][0][key] = ["0.png"]  # as Ollama writes them
    assert refusal(lambda: lines(kind, [record], tmp_path)[0]).field == f"{name}[0].{key}"


@pytest.mark.parametrize("kind", TEXT)
def test_text_only_records_are_valid(kind, tmp_path):
    source = lines(kind, [TEXT[kind]], tmp_path)
    assert source[0].media == () and not source.unread


@pytest.mark.parametrize(
    ("kind", "row", "key"),
    [
        ("flan", {"inputs": "q", "targets": "a", "images": [{"bytes": PIXELS, "path": None}]}, "images"),
        ("flan", {"inputs": "q", "targets": "a", "image": PIXELS}, "image"),
        ("cauldron", {"texts": [{"user": "q", "assistant": "a"}], "images": [], "image": {"bytes": PIXELS}}, "image"),
        ("messages", {"messages": SAID, "picture": PIXELS}, "picture"),
        ("vflan", {"question": "q", "answer": "a", "image": "", "pixels": 1, "img": TEXT64}, "img"),
    ],
)
def test_a_column_that_the_format_does_not_read_is_an_error(kind, row, key, tmp_path):
    empty = {**row, key: None}
    source = FORMATS[kind].open(write_parquet(tmp_path / "d.parquet", [row, empty] * 3), tmp_path)
    assert source[1].media == ()
    error = refusal(lambda: source[4])
    assert (error.file, error.record, error.field) == (str(tmp_path / "d.parquet"), 4, key)


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("vflan", {"question": "q", "answer": "a"}),
        ("webdataset", {"question": "q", "answer": "a", "image": []}),
        ("webdataset", {"messages": SAID}),
        ("mmc4", {"text_list": ["a"]}),
    ],
)
@pytest.mark.parametrize("member", ["jpg", "0.png", "mp4"])
def test_a_member_that_no_record_refers_to_is_an_error(kind, record, member, tmp_path):
    path = write_tar(tmp_path / "d.tar", [("k.json", record), (f"k.{member}", PIXELS), ("l.json", record)])
    source = FORMATS[kind].open(path, tmp_path)
    error = refusal(lambda: source[0])
    assert (error.file, error.record, error.field) == (str(path), "key k", f"member {member}")
    assert source[1].media == ()


def test_a_video_under_a_key_of_another_record_type_of_a_shard_is_an_error(tmp_path):
    path = write_tar(tmp_path / "d.tar", [("k.json", {"question": "q", "answer": "a", "videos": ["v.mp4"]})])
    assert refusal(lambda: FORMATS["webdataset"].open(path, tmp_path)[0]).field == "videos"


def test_images_that_options_leave_out_are_not_an_error(tmp_path):
    info = [{"matched_text_index": 0, "matched_sim": 0.1, "file": "0.jpg"}]
    document = {"text_list": ["a"], "image_info": info}
    path = write_tar(tmp_path / "d.tar", [("k.0.jpg", PIXELS), ("k.json", document)])
    for options in ({"max_images": 0}, {"min_similarity": 0.5}):
        source = FORMATS["mmc4"].open(path, tmp_path, **options)
        assert source[0].media == () and not source.unread


def test_other_media_of_a_record_with_media_are_counted(tmp_path):
    records = [
        {"image": "p.png", "conversations": [{"from": "human", "value": "<image>?"}, TURNS[1]], "images": ["p.png"]},
        {"image": "p.png", "conversations": [{"from": "human", "value": "<image>?"}, TURNS[1]]},
    ]
    source = lines("llava_json", records * 2, tmp_path)
    assert [len(sample.media) for sample in source] == [1] * 4
    assert source.unread == {"images": 2}
    assert Subset(source, 2).unread is Split(source, 0.5, True).unread is source.unread


def test_other_members_and_columns_are_counted(tmp_path):
    path = write_tar(tmp_path / "d.tar", [("k.jpg", PIXELS), ("k.mp4", b"clip"), ("k.txt", "t")])
    source = FORMATS["coyo"].open(path, tmp_path)
    assert source[0].media and source.unread == {"member mp4": 1}
    rows = [{"image": PIXELS, "image_2": PIXELS, "text": "t"}] * 3
    source = FORMATS["coyo"].open(write_parquet(tmp_path / "d.parquet", rows), tmp_path)
    assert [len(sample.media) for sample in source] == [1] * 3
    assert source.unread == {"image_2": 1}  # the other records are not looked into


@pytest.mark.parametrize("case", GOOD, ids="-".join)
def test_valid_data_have_nothing_unread(case, tmp_path):
    source = FORMATS[case[0]].open(GOOD[case](tmp_path), tmp_path)
    assert list(source) and not source.unread


@pytest.mark.parametrize("case", GOOD, ids="-".join)
def test_the_location_of_a_sample_is_its_file_and_record(case, tmp_path):
    path = GOOD[case](tmp_path)
    source = FORMATS[case[0]].open(path, tmp_path)
    assert [source.location(n) for n in range(len(source))] == [(str(path), n) for n in range(len(source))]
    assert Subset(source, 2).location(0) in {(str(path), n) for n in range(len(source))}
