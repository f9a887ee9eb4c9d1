"""Documents with images from a failing server: kept images, listed failures, and resuming."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.prepare.image_server import jpeg, serving
from vila.core.errors import ConfigError, DataError
from vila.core.files import sha256_file
from vila.media.http_options import DownloadOptions
from vila.prepare.mmc4 import prepare_mmc4
from vila.prepare.resumable_download import KEEP_ORIGINAL, DownloadedImage, DownloadJournal, ResizeRule
from vila.prepare.shards import read_tar

OPTIONS = DownloadOptions(
    allow_private=True, host_delay_s=0.0, initial_backoff_s=0.01, max_connections_per_host=32,
    max_bytes=100_000, read_timeout_s=5.0, total_timeout_s=5.0, max_attempts=2, max_connections=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


def document(home: str, *paths: str, **fields) -> dict:
    infos = [
        {"raw_url": home + path, "image_name": f"{n}.png", "matched_text_index": 1} for n, path in enumerate(paths)
    ]
    matrix = [[float(n), 0.5] for n in range(len(paths))]
    return {"text_list": ["One.", "Two."], "image_info": infos, "similarity_matrix": matrix, "url": "u", **fields}


def write_shard(path: Path, documents: list[dict]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in documents))
    return path


def samples(out: Path) -> dict[str, dict[str, bytes]]:
    return {one.key: dict(one.members) for file in sorted(out.glob("*.tar")) for one in read_tar(file)}


def failures(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log" / "failures.jsonl").read_text().splitlines()]


def test_a_document_loses_failed_images_with_their_similarities(server, tmp_path):
    paths = ["/missing", "/good/1", "/html", "/good/2", "/bomb", "/half", "/empty", "/slow/2", "/loop/0"]
    shard = write_shard(tmp_path / "a.jsonl", [document(server.home, *paths)])
    index = prepare_mmc4([shard], tmp_path / "out", download=replace(OPTIONS, read_timeout_s=0.5), resize=KEEP_ORIGINAL)

    ((key, members),) = samples(tmp_path / "out").items()
    kept = json.loads(members["json"])
    assert key == "a-000001"
    assert [(one["file"], one["image_name"]) for one in kept["image_info"]] == [("0.jpg", "1.png"), ("1.jpg", "3.png")]
    assert kept["similarity_matrix"] == [[1.0, 0.5], [3.0, 0.5]]
    assert kept["text_list"] == ["One.", "Two."] and kept["url"] == "u"
    assert (members["0.jpg"], members["1.jpg"]) == (jpeg(1), jpeg(2))

    listed = {
        one["url"].removeprefix(server.home): (one["kind"], one["attempts"]) for one in failures(tmp_path / "out")
    }
    assert listed == {
        "/missing": ("http_404", 1), "/html": ("not_an_image", 1), "/bomb": ("not_an_image", 1),
        "/half": ("not_an_image", 1), "/empty": ("not_an_image", 1), "/slow/2": ("timeout", 2),
        "/loop/0": ("redirect", 1),
    }  # fmt: skip
    assert all(one["reason"] and one["unit"] == "a" for one in failures(tmp_path / "out"))
    noted = {"documents without some image": 1, "http_404": 1, "not_an_image": 4, "redirect": 1, "timeout": 1}
    assert index["counts"] == {"in": 1, "out": 1, "dropped": {}, "noted": noted}


def test_drop_incomplete_drops_a_document_with_one_failed_image(server, tmp_path):
    home = server.home
    documents = [
        document(home, "/good/1", "/missing"),
        document(home, "/good/2"),
        document(home, "/gone"),
        document(home),
    ]
    shard = write_shard(tmp_path / "a.jsonl", documents)
    strict = prepare_mmc4([shard], tmp_path / "strict", drop_incomplete=True, download=OPTIONS)
    ours = prepare_mmc4([shard], tmp_path / "ours", download=OPTIONS)
    assert list(samples(tmp_path / "strict")) == ["a-000002"]
    assert strict["counts"]["dropped"] == {"an image failed": 2, "no image": 1}
    assert list(samples(tmp_path / "ours")) == ["a-000001", "a-000002"]
    assert ours["counts"]["dropped"] == {"no image": 1, "no image left": 1}


def test_dropped_records_are_counted_by_reason_and_listed_by_number(server, tmp_path):
    bad_index = document(server.home, "/good/1")
    bad_index["image_info"][0]["matched_text_index"] = 2
    no_url = document(server.home, "/good/1")
    del no_url["image_info"][0]["raw_url"]
    short = document(server.home, "/good/1", similarity_matrix=[])
    documents = [{"text_list": "x"}, {"text_list": []}, bad_index, no_url, short, document(server.home, "/good/1")]
    index = prepare_mmc4([write_shard(tmp_path / "a.jsonl", documents)], tmp_path / "out", download=OPTIONS)
    assert index["counts"]["in"] == 6 and index["counts"]["out"] == 1
    assert index["counts"]["dropped"] == {
        "text_list is not a list of sentences": 1, "image_info is not a list of objects": 1,
        "matched_text_index names no sentence": 1, "an image without raw_url": 1,
        "similarity_matrix and image_info differ in length": 1,
    }  # fmt: skip
    assert [one["row"] for one in failures(tmp_path / "out")] == [1, 2, 3, 4, 5]


def test_uneven_inputs_become_even_shards_without_loss(server, tmp_path):
    numbers = iter(range(100))
    shards = [
        write_shard(tmp_path / f"s{n}.jsonl", [document(server.home, f"/good/{next(numbers)}") for _ in range(size)])
        for n, size in enumerate((7, 1, 3))
    ]
    index = prepare_mmc4(shards, tmp_path / "out", download=OPTIONS, resize=KEEP_ORIGINAL, per_shard=4)
    assert [one["samples"] for one in index["shards"]] == [3, 4, 4]
    assert [one["file"] for one in index["shards"]] == [f"mmc4-00000{n}.tar" for n in range(3)]
    for one in index["shards"]:
        path = tmp_path / "out" / one["file"]
        assert (path.stat().st_size, sha256_file(path)) == (one["bytes"], one["sha256"])
    assert [members["0.jpg"] for members in samples(tmp_path / "out").values()] == [jpeg(n) for n in range(11)]


def test_workers_share_the_units_and_the_last_one_writes_the_index(server, tmp_path):
    shards = [write_shard(tmp_path / f"s{n}.jsonl", [document(server.home, f"/good/{n}")] * 2) for n in range(3)]
    options = {"download": OPTIONS, "per_shard": 2}
    assert prepare_mmc4(shards, tmp_path / "two", shard=(0, 2), **options) is None
    assert prepare_mmc4(shards, tmp_path / "two", shard=(1, 2), **options) is None
    assert not (tmp_path / "two" / "index.json").exists()  # the shards of worker 0 wait for all parts
    assert prepare_mmc4(shards, tmp_path / "two", shard=(0, 2), **options) is not None
    prepare_mmc4(shards, tmp_path / "one", **options)
    assert (tmp_path / "two" / "index.json").read_bytes() == (tmp_path / "one" / "index.json").read_bytes()


def test_a_second_call_requests_and_changes_nothing(server, tmp_path):
    shard = write_shard(tmp_path / "a.jsonl", [document(server.home, "/good/77", "/missing-77")])
    first = prepare_mmc4([shard], tmp_path / "out", download=OPTIONS, keep_parts=False)
    again = prepare_mmc4([shard], tmp_path / "out", download=OPTIONS, keep_parts=False)
    assert first == again
    assert server.asked["/good/77"] == server.asked["/missing-77"] == 1
    assert not (tmp_path / "out" / "parts").exists()


def test_a_url_in_two_documents_is_downloaded_once(server, tmp_path):
    shard = write_shard(tmp_path / "a.jsonl", [document(server.home, "/good/88", "/good/88")] * 2)
    index = prepare_mmc4([shard], tmp_path / "out", download=OPTIONS)
    assert index["counts"]["out"] == 2 and server.asked["/good/88"] == 1


def test_other_settings_or_inputs_are_refused_for_the_same_output(server, tmp_path):
    shard = write_shard(tmp_path / "a.jsonl", [document(server.home, "/good/1")])
    prepare_mmc4([shard], tmp_path / "out", download=OPTIONS)
    with pytest.raises(ConfigError) as caught:
        prepare_mmc4([shard], tmp_path / "out", download=OPTIONS, resize=ResizeRule(512))
    assert (caught.value.field, caught.value.value, caught.value.expected) == ("short_side", 512, "336")
    write_shard(shard, [document(server.home, "/good/1", "/good/2")])
    with pytest.raises(ConfigError) as caught:
        prepare_mmc4([shard], tmp_path / "out", download=OPTIONS)
    assert caught.value.field == "inputs"


def test_large_images_are_resized(server, tmp_path):
    from io import BytesIO

    from PIL import Image

    shard = write_shard(tmp_path / "a.jsonl", [document(server.home, "/large/1")])
    prepare_mmc4([shard], tmp_path / "out", download=OPTIONS)
    ((_, members),) = samples(tmp_path / "out").items()
    assert Image.open(BytesIO(members["0.jpg"])).size == (672, 336)


def test_a_truncated_journal_keeps_the_complete_entries(tmp_path):
    results = [(f"u{n}", DownloadedImage(bytes([n]) * (50 + n), "jpg")) for n in range(4)]
    with DownloadJournal(tmp_path / "whole") as journal:
        journal.append(results)
    whole = (tmp_path / "whole").read_bytes()
    for cut in range(0, len(whole), 29):
        (tmp_path / "cut").write_bytes(whole[:cut])
        with DownloadJournal(tmp_path / "cut") as journal:
            known = [url for url, _ in results if url in journal]
            assert known == [url for url, _ in results][: len(known)]
            journal.append([one for one in results if one[0] not in known])
        assert (tmp_path / "cut").read_bytes() == whole


def test_two_processes_on_one_unit_are_refused(tmp_path):
    with DownloadJournal(tmp_path / "s"), pytest.raises(DataError) as caught:
        DownloadJournal(tmp_path / "s").__enter__()
    assert caught.value.file == str(tmp_path / "s")


def test_append_syncs_the_journal(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("vila.prepare.resumable_download.os.fsync", lambda file: synced.append(os.fstat(file).st_size))
    with DownloadJournal(tmp_path / "s") as journal:
        journal.append([(f"u{n}", DownloadedImage(b"x" * 99, "jpg")) for n in range(3)])
        assert synced == [(tmp_path / "s").stat().st_size]


def test_more_units_than_connections_do_not_deadlock(server, tmp_path):
    shards = [
        write_shard(tmp_path / f"s{n}.jsonl", [document(server.home, *(f"/good/{n * 5 + k}" for k in range(5)))])
        for n in range(12)
    ]
    index = prepare_mmc4(shards, tmp_path / "out", download=replace(OPTIONS, max_connections=3))
    assert index["counts"]["out"] == 12 and "documents without some image" not in index["counts"]["noted"]
