"""COYO: selection of records, their order, and the downloaded pairs."""

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.prepare.image_server import jpeg, serving
from vila.core.errors import ConfigError, DataError
from vila.media.http_options import DownloadOptions
from vila.prepare.coyo import best_rows, prepare_coyo, select_coyo
from vila.prepare.resumable_download import KEEP_ORIGINAL
from vila.prepare.shards import read_tar

RULES = DownloadOptions(allow_private=True, host_delay_s=0.0, initial_backoff_s=0.01, max_connections_per_host=32)


def write_table(path: Path, home: str, scores: list[float | None], **columns: list) -> Path:
    count = len(scores)
    table = {
        "id": list(range(100, 100 + count)), "url": [f"{home}/good/{n}" for n in range(count)],
        "text": [f"caption {n}" for n in range(count)], "width": [9] * count,
        "clip_similarity_vitb32": [None if score is None else score / 2 for score in scores],
        "clip_similarity_vitl14": [None if score is None else score / 2 for score in scores],
    }  # fmt: skip
    pq.write_table(pa.table(table | columns), path)
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_best_share_above_the_threshold_is_selected_best_first():
    scores = [0.1, 0.9, math.nan, 0.7, 0.8, 0.65, 0.9, 0.2, 0.3, 0.4]
    assert best_rows(scores, 0.2, 0.6) == [1, 6]
    assert best_rows(scores, 0.5, 0.85) == [1, 6]
    assert best_rows(scores, None, 0.6) == [1, 6, 4, 3, 5]
    assert best_rows(scores, 0.3, None) == [1, 6, 4]
    assert best_rows([0.5] * 10, 0.3, None) == [0, 1, 2]
    assert best_rows([0.6, 0.600001], None, 0.6) == [1]


def test_selection_sums_both_similarities_and_counts_the_other_rows(tmp_path):
    path = write_table(tmp_path / "part-0.parquet", "http://h", [0.7, 0.5, 0.9, None, 0.8, 0.65, 0.1, 0.2, 0.3, 0.4])
    (selected,) = select_coyo([path], tmp_path / "out", share=0.2)
    assert lines(selected) == [
        {"id": 102, "url": "http://h/good/2", "text": "caption 2", "clip_sim": 0.9},
        {"id": 104, "url": "http://h/good/4", "text": "caption 4", "clip_sim": 0.8},
    ]
    counts = json.loads((tmp_path / "out" / "part-0.selected.json").read_text())["counts"]
    assert counts["in"] == 10 and counts["out"] == 2
    assert counts["dropped"] == {"below the threshold": 6, "outside the share": 2}


def test_workers_select_disjoint_files_and_lists_have_a_bounded_length(tmp_path):
    paths = [write_table(tmp_path / f"p{n}.parquet", "http://h", [0.7] * 5) for n in range(3)]
    options = {"share": 1.0, "rows_per_unit": 2}
    first = select_coyo(paths, tmp_path / "out", shard=(0, 2), **options)
    second = select_coyo(paths, tmp_path / "out", shard=(1, 2), **options)
    assert [path.name for path in first] == [f"p{n}-000{k}.jsonl" for n in (0, 2) for k in range(3)]
    assert [path.name for path in second] == [f"p1-000{k}.jsonl" for k in range(3)]
    assert [len(lines(path)) for path in second] == [2, 2, 1]
    assert select_coyo(paths, tmp_path / "out", shard=(1, 2), **options) == second


def test_pairs_are_downloaded_and_failures_are_dropped_by_reason(tmp_path):
    with serving() as server:
        columns = {"url": [server.home + path for path in ("/good/4", "/missing", "/good/6", "/html")]}
        path = write_table(tmp_path / "p.parquet", server.home, [0.9, 0.8, 0.7, 0.65], **columns)
        selected = select_coyo([path], tmp_path / "lists", share=None)
        index = prepare_coyo(selected, tmp_path / "out", download=RULES, resize=KEEP_ORIGINAL)
    got = {one.key: dict(one.members) for one in read_tar(tmp_path / "out" / "coyo-000000.tar")}
    assert list(got) == ["p-0000-000001", "p-0000-000003"]
    assert got["p-0000-000003"]["jpg"] == jpeg(6) and got["p-0000-000003"]["txt"] == b"caption 2"
    facts = json.loads(got["p-0000-000003"]["json"])
    assert facts == {"id": 102, "url": f"{server.home}/good/6", "clip_sim": pytest.approx(0.7)}
    assert index["counts"]["dropped"] == {"http_404": 1, "not_an_image": 1}


@pytest.mark.parametrize("options, field", [({"share": None, "threshold": None}, None), ({"share": 1.5}, "share")])
def test_invalid_selection_criteria_are_refused(tmp_path, options, field):
    path = write_table(tmp_path / "p.parquet", "http://h", [0.7])
    with pytest.raises(ConfigError) as caught:
        select_coyo([path], tmp_path / "out", **options)
    assert caught.value.field == field


def test_a_table_without_the_scores_is_named(tmp_path):
    pq.write_table(pa.table({"id": [1], "url": ["u"], "text": ["t"]}), tmp_path / "p.parquet")
    with pytest.raises(DataError) as caught:
        select_coyo([tmp_path / "p.parquet"], tmp_path / "out")
    assert (caught.value.file, caught.value.field) == (str(tmp_path / "p.parquet"), "clip_similarity_vitb32")
