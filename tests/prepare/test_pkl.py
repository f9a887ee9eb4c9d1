"""Pickle shards of the released code become WebDataset shards with the same records and bytes."""

import base64
import json
import pickle
from pathlib import Path

import pytest

from tests.prepare.image_server import bomb, jpeg
from vila.core.errors import DataError
from vila.prepare.pkl import convert_pickles
from vila.prepare.shards import read_tar


def b64(number: int) -> str:
    return base64.b64encode(jpeg(number)).decode()


def write(folder: Path, name: str, records: object, count: object = None) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.pkl").write_bytes(pickle.dumps(records))
    (folder / f"{name}.count").write_text(str(len(records) if count is None else count))


def samples(out: Path) -> dict[str, dict[str, bytes]]:
    return {one.key: dict(one.members) for file in sorted(out.glob("*.tar")) for one in read_tar(file)}


def test_mmc4_documents_keep_their_fields_and_their_images(tmp_path):
    info = {"image_base64": b64(1), "matched_text_index": 1, "raw_url": "http://u/a.jpg", "matched_sim": 0.25}
    extra = {"image_base64": b64(2), "matched_text_index": 0}
    document = {"text_list": ["A.", "B."], "image_info": [info, extra], "similarity_matrix": [[0.1, 0.2], [0.3, 0.4]]}
    write(tmp_path / "in", "part-0", [document, document | {"image_info": [info]}])
    index = convert_pickles(tmp_path / "in", tmp_path / "out", "mmc4")
    got = samples(tmp_path / "out")["part-0-000001"]
    assert (got["0.jpg"], got["1.jpg"]) == (jpeg(1), jpeg(2))
    assert json.loads(got["json"]) == document | {
        "image_info": [
            {"matched_text_index": 1, "raw_url": "http://u/a.jpg", "matched_sim": 0.25, "file": "0.jpg"},
            {"matched_text_index": 0, "file": "1.jpg"},
        ]
    }
    assert index["kind"] == "mmc4" and index["counts"]["in"] == 2 and index["counts"]["out"] == 1
    assert index["counts"]["dropped"] == {"similarity_matrix and image_info differ in length": 1}


def test_coyo_pairs_are_read_with_either_spelling_of_the_keys(tmp_path):
    records = [
        {"id": 1, "url": "u", "text": "one", "clip_sim": 0.7, "image": b64(1)},
        {"id": 2, "url": "v", "caption": "two", "rawbytes": jpeg(2)},
        {"id": 3, "text": " ", "image": b64(3)}, {"id": 4, "text": "four"}, {"text": "five", "image": "!!"},
        {"text": "six", "image": base64.b64encode(bomb()).decode()}, "seven",
    ]  # fmt: skip
    write(tmp_path / "in", "part", records)
    index = convert_pickles(tmp_path / "in", tmp_path / "out", "coyo")
    got = samples(tmp_path / "out")
    assert got["part-000001"] == {"jpg": jpeg(1), "txt": b"one", "json": b'{"id": 1, "url": "u", "clip_sim": 0.7}'}
    assert got["part-000002"] == {"jpg": jpeg(2), "txt": b"two", "json": b'{"id": 2, "url": "v"}'}
    dropped = {"no text": 1, "no image": 1, "damaged base64": 1, "not an image": 1, "not a record": 1}
    assert index["kind"] == "pairs" and index["counts"]["dropped"] == dropped
    listed = [json.loads(line) for line in (tmp_path / "out" / "log" / "failures.jsonl").read_text().splitlines()]
    assert [(one["unit"], one["row"]) for one in listed] == [("part", row) for row in range(3, 8)]


def test_vflan_records_have_any_number_of_images(tmp_path):
    records = [
        {"question": "Which?\n", "answer": "This.", "image": [b64(1), b64(2)]},
        {"question:": "What?", "answer:": "That.", "image:": b64(3)},
        {"question": "Why?", "answer": "So.", "image": []}, {"question": "Q", "answer": "A", "image": "images/a.jpg"},
        {"question": "Q", "answer": ""},
    ]  # fmt: skip
    write(tmp_path / "in", "x", records)
    index = convert_pickles(tmp_path / "in", tmp_path / "out", "vflan")
    got = [json.loads(members["json"]) for members in samples(tmp_path / "out").values()]
    assert got == [
        {"question": "Which?\n", "answer": "This.", "image": ["0.jpg", "1.jpg"]},
        {"question": "What?", "answer": "That.", "image": ["0.jpg"]},
        {"question": "Why?", "answer": "So.", "image": []},
    ]
    assert index["counts"]["dropped"] == {"a path instead of an image": 1, "no answer": 1}


def test_uneven_shards_become_even_without_loss(tmp_path):
    for name, size in (("a", 5), ("b", 2), ("c", 4)):
        write(tmp_path / "in", name, [{"text": f"{name}{n}", "image": jpeg(n)} for n in range(size)])
    index = convert_pickles(tmp_path / "in", tmp_path / "out", "coyo", per_shard=4)
    assert [one["samples"] for one in index["shards"]] == [3, 4, 4]
    texts = [members["txt"].decode() for members in samples(tmp_path / "out").values()]
    assert texts == ["a0", "a1", "a2", "a3", "a4", "b0", "b1", "c0", "c1", "c2", "c3"]


@pytest.mark.parametrize("records, count, value", [([{}], 2, 1), ({"a": 1}, 1, "dict")])
def test_a_shard_that_contradicts_its_count_or_is_not_a_list_is_refused(tmp_path, records, count, value):
    write(tmp_path / "in", "part", records, count)
    with pytest.raises(DataError) as caught:
        convert_pickles(tmp_path / "in", tmp_path / "out", "coyo")
    assert (caught.value.file, caught.value.value) == (str(tmp_path / "in" / "part.pkl"), value)
    assert not list((tmp_path / "out").glob("*.tar"))
