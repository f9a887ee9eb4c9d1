"""LLaVA and ShareGPT4V JSON: valid records are unchanged, others are listed with number and reason."""

import io
import json
import struct
import zipfile
from pathlib import Path

import pytest

from tests.prepare.image_server import jpeg
from vila.core.errors import ConfigError, DataError
from vila.prepare import llava_json
from vila.prepare.llava_json import is_repetitive, prepare_llava_align, prepare_sharegpt4v, unpack_images


def record(name: str, answer: str = "A cat.", **fields) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": f"{name}.jpg", "conversations": turns, **fields}


def write(path: Path, records: object) -> Path:
    path.write_text(json.dumps(records))
    return path


def failures(out: Path) -> list[tuple[int, str]]:
    lines = (out / "log" / "failures.jsonl").read_text().splitlines()
    return [(json.loads(line)["row"], json.loads(line)["reason"]) for line in lines]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.jpg").write_bytes(jpeg(1))
    (folder / "broken.jpg").write_bytes(jpeg(1, (300, 300))[:200])
    (tmp_path / "secret.jpg").write_bytes(jpeg(2))
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    return folder


BAD = [
    (record("lost"), "an image is missing"), (record("x", image="../secret.jpg"), "an image outside the folder"),
    (record("link"), "an image outside the folder"), (record("x", image="/etc/passwd"), "an image outside the folder"),
    (record("broken"), "not an image"), (record("a", answer=" "), "an empty answer"),
    (record("a", answer="<image>"), "an image in an answer"),
    (record("a", image=["a.jpg", "b.jpg"]), "not exactly one image"),
    (record("a", conversations=[]), "no conversations"),
    (record("a", conversations=[{"from": "gpt", "value": "x"}] * 2), "not human and gpt in turn"),
    (record("a", conversations=[{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]),
     "markers and images differ"),
    (record("a", conversations=[{"from": "human"}, {"from": "gpt", "value": "y"}]), "a turn without text"),
    ("text", "not a record"), ({"id": "x", "conversations": record("a")["conversations"]}, "not exactly one image"),
]  # fmt: skip


def test_valid_records_are_unchanged_and_others_are_listed(tmp_path, images):
    source = write(tmp_path / "chat.json", [record("a"), *(bad for bad, _ in BAD), record("b")])
    index = prepare_llava_align(source, images, tmp_path / "out", decode=True)
    assert json.loads((tmp_path / "out" / "LLaVA-CC3M-Pretrain-595K.json").read_text()) == [record("a"), record("b")]
    assert failures(tmp_path / "out") == [(row, reason) for row, (_, reason) in enumerate(BAD, start=2)]
    assert index["counts"]["in"] == len(BAD) + 2 and index["shards"][0]["samples"] == 2
    assert prepare_llava_align(source, images, tmp_path / "out", decode=True) == index
    with pytest.raises(ConfigError):
        prepare_llava_align(source, images, tmp_path / "out")


def test_the_published_zip_is_extracted(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a.jpg", jpeg(1))
        archive.writestr("deep/b.jpg", jpeg(2))
    source = write(tmp_path / "chat.json", [record("a"), record("deep/b")])
    index = prepare_llava_align(source, tmp_path / "images.zip", tmp_path / "out")
    assert index["counts"]["out"] == 2
    assert (tmp_path / "out" / "images" / "deep" / "b.jpg").read_bytes() == jpeg(2)


@pytest.mark.parametrize("name", ["../x.jpg", "/x.jpg", "a/../../x.jpg", "..\\x.jpg"])
def test_a_zip_with_members_outside_the_folder_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "i.zip", "w") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(DataError) as caught:
        unpack_images(tmp_path / "i.zip", tmp_path / "out" / "images")
    assert (caught.value.file, caught.value.record) == (str(tmp_path / "i.zip"), f"member {name!r}")
    assert not (tmp_path / "out" / "images").exists() and not list(tmp_path.rglob("x.jpg"))


def test_zip_bombs_are_refused_by_announced_and_by_actual_size(tmp_path, monkeypatch):
    monkeypatch.setattr(llava_json, "MAX_MEMBER_BYTES", 10_000)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", b"\0" * 1_000_000)
    honest = stream.getvalue()
    lying = honest.replace(struct.pack("<I", 1_000_000), struct.pack("<I", 100))
    for content in (honest, lying):
        (tmp_path / "i.zip").write_bytes(content)
        with pytest.raises(DataError) as caught:
            unpack_images(tmp_path / "i.zip", tmp_path / "images")
        assert caught.value.record == "member 'a.jpg'"
        assert ("10,000" in (caught.value.expected or "")) == (content is honest)
        assert not (tmp_path / "images").exists()


def test_sharegpt4v_drops_sam_images_and_repetitive_answers(tmp_path):
    records = [
        record("a"), record("sa_1234"), record("9", image="sam/images/sa_9.jpg"),
        record("b", "The sky is so blue. " * 5),
        {"id": "text", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    ]  # fmt: skip
    source = write(tmp_path / "cap100k.json", records)
    index = prepare_sharegpt4v(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "cap100k.json").read_text()) == [records[0], records[4]]
    assert index["counts"]["dropped"] == {"an SA-1B image": 2, "a repetitive answer": 1}
    assert prepare_sharegpt4v(source, tmp_path / "sam", keep_sam=True)["counts"]["out"] == 4


def test_sharegpt4v_checks_images_if_their_folder_is_given(tmp_path, images):
    source = write(tmp_path / "c.json", [record("a"), record("lost")])
    assert prepare_sharegpt4v(source, tmp_path / "out", images=images)["counts"]["dropped"] == {
        "an image is missing": 1
    }


@pytest.mark.parametrize("text, repeats", [
    ("A dog runs. A dog sleeps. A dog eats. The end.", False), ("Yes. Yes. Yes. Yes.", False), ("", False),
    ("It is a dog. It is a cat. It is a dog. It is a cow. It is a dog.", True),
    ("and then there is a tree on the left " * 4, True), ("one two three four five six seven eight " * 2, False),
])  # fmt: skip
def test_repetitive_texts(text, repeats):
    assert is_repetitive(text) is repeats


def test_a_source_that_is_not_a_list_or_truncated_is_refused_by_name(tmp_path):
    for content, word in (
        ("{}", "not a list"),
        ('{"data": [{"id": 1}]}', "not a list"),
        ('[{"id": 1}, {"i', "not JSON"),
    ):
        (tmp_path / "cut.json").write_text(content)
        with pytest.raises(DataError) as caught:
            prepare_sharegpt4v(tmp_path / "cut.json", tmp_path / f"out{len(content)}")
        assert caught.value.file == str(tmp_path / "cut.json") and word in caught.value.problem
        assert ("data" in content) == ("'data'" in (caught.value.hint or ""))
