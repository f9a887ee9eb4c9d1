"""M3IT and FLAN: questions, selection of records, and equal results for several workers."""

import base64
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.other_process import HOST, PID, killed_writer, locked_elsewhere
from tests.prepare.image_server import jpeg
from vila.core.errors import ConfigError, DirectoryInUseError, UnknownNameError
from vila.prepare.shards import read_tar
from vila.prepare.vflan import first_index, prepare_flan, prepare_m3it, spaced_row


def b64(number: int) -> str:
    return base64.b64encode(jpeg(number)).decode()


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(**fields: object) -> dict:
    return {"instruction": "Answer: ", "inputs": "why?", "outputs": "So.", "image_base64_str": [b64(1)], **fields}


def samples(out: Path) -> list[tuple[str, dict, dict]]:
    every = [one for file in sorted(out.glob("*.tar")) for one in read_tar(file)]
    return [(one.key, json.loads(dict(one.members)["json"]), dict(one.members)) for one in every]


def test_a_question_is_instruction_and_inputs_without_separator(tmp_path):
    file = write_lines(tmp_path / "gqa" / "train.jsonl", [row(), row(inputs=None, image_base64_str=b64(2))])
    index = prepare_m3it({"gqa": [file]}, tmp_path / "out")
    (key, first, members), (_, second, _) = samples(tmp_path / "out")
    assert key == "gqa-0000-0000001"
    assert first == {"question": "Answer: why?", "answer": "So.", "image": ["0.jpg"]} and members["0.jpg"] == jpeg(1)
    assert second["question"] == "Answer: "
    assert index["kind"] == "vflan" and index["counts"]["out"] == 2


def test_a_missing_instruction_is_drawn_deterministically_from_the_list_of_its_set(tmp_path):
    rows = [{"inputs": f" {n}", "outputs": "yes", "image_base64_str": [b64(n)]} for n in range(12)]
    file = write_lines(tmp_path / "clevr" / "train.jsonl", rows)
    (tmp_path / "clevr" / "instructions.json").write_text('["A", "B"]')
    for out in ("one", "two"):
        prepare_m3it({"clevr": [file]}, tmp_path / out)
    questions = [record["question"] for _, record, _ in samples(tmp_path / "one")]
    assert questions == [record["question"] for _, record, _ in samples(tmp_path / "two")]
    assert {question[0] for question in questions} == {"A", "B"}


@pytest.mark.parametrize(
    ("lock", "shard", "refused"),
    [
        (".lock", (0, 1), True),
        (".lock", (0, 2), True),
        (".lock-0-of-2", (0, 2), True),
        (".lock-1-of-2", (0, 2), False),
    ],
)
def test_a_directory_is_locked_by_one_process_or_by_each_worker_once(tmp_path, lock, shard, refused):
    file = write_lines(tmp_path / "gqa" / "train.jsonl", [row()])
    with locked_elsewhere(tmp_path / "out", lock):
        if refused:
            with pytest.raises(DirectoryInUseError) as caught:
                prepare_m3it({"gqa": [file]}, tmp_path / "out", shard=shard)
            assert (caught.value.host, caught.value.pid) == (HOST, PID)
        else:
            prepare_m3it({"gqa": [file]}, tmp_path / "out", shard=shard)


def test_partial_files_of_killed_processes_are_removed(tmp_path):
    file = write_lines(tmp_path / "gqa" / "train.jsonl", [row()])
    for name in ("x.tar", "parts/x.tar"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        killed_writer(tmp_path / "out" / name)
    prepare_m3it({"gqa": [file]}, tmp_path / "out")
    assert not list((tmp_path / "out").rglob(".*"))


def test_dropped_records_are_counted_by_reason(tmp_path):
    rows = [row(outputs=""), row(image_base64_str=["??"]), row(image_base64_str=[None]), {"inputs": "x"}, row()]
    index = prepare_m3it({"nlvr": [write_lines(tmp_path / "n" / "t.jsonl", rows)]}, tmp_path / "out")
    assert index["counts"]["dropped"] == {"damaged base64": 1, "no answer": 1, "no image": 1, "no instruction": 1}
    assert index["counts"]["out"] == 1


def test_unknown_sets_are_refused_by_name(tmp_path):
    with pytest.raises(UnknownNameError) as caught:
        prepare_m3it({"vqav2": []}, tmp_path / "out")
    assert (caught.value.name, caught.value.near[0]) == ("vqav2", "vqa-v2")


@pytest.mark.parametrize("total, rows", [(10, 4), (7, 7), (378_000_000, 1_000_000), (16_777_219, 16_777_217), (5, 1)])
def test_spaced_rows_are_distinct_in_range_and_even(total, rows):
    some = range(rows) if rows < 100 else [*range(50), *range(rows // 2, rows // 2 + 50), *range(rows - 50, rows)]
    taken = [spaced_row(index, total, rows) for index in some]
    assert taken == sorted(set(taken)) and taken[0] == 0 and taken[-1] < total
    for index in some:
        assert first_index(spaced_row(index, total, rows), total, rows) == index
        assert abs(spaced_row(index, total, rows) - index * total / rows) < 1


def write_tables(folder: Path, sizes: tuple[int, ...]) -> list[Path]:
    folder.mkdir()
    paths, start = [], 0
    for number, size in enumerate(sizes):
        numbers = range(start, start + size)
        table = {"inputs": [f"q{n}" for n in numbers], "targets": [f"a{n}" if n != 6 else None for n in numbers]}
        paths.append(folder / f"t{number}.parquet")
        pq.write_table(pa.table(table | {"other": list(numbers)}), paths[-1])
        start += size
    return paths


def flan_rows(out: Path) -> list[dict]:
    return [json.loads(line) for file in sorted(out.glob("flan-*.jsonl")) for line in file.read_text().splitlines()]


def test_flan_rows_are_spaced_over_all_files_as_over_one_table(tmp_path):
    paths = write_tables(tmp_path / "in", (5, 1, 0, 9))
    index = prepare_flan(paths, tmp_path / "out", rows=8, per_shard=3)
    wanted = [(n, spaced_row(n, 15, 8)) for n in range(8)]
    assert flan_rows(tmp_path / "out") == [
        {"id": f"text_flan_{n:08d}", "question": f"q{row}", "answer": f"a{row}"} for n, row in wanted
    ]
    assert [one["samples"] for one in index["shards"]] == [2, 3, 3]
    assert index["counts"]["in"] == 8


def test_flan_drops_rows_without_an_answer_and_two_workers_equal_one(tmp_path):
    paths = write_tables(tmp_path / "in", (5, 4, 6))
    index = prepare_flan(paths, tmp_path / "one", rows=15)
    assert index["counts"]["dropped"] == {"no question or no answer": 1} and index["counts"]["out"] == 14
    assert prepare_flan(paths, tmp_path / "two", rows=15, shard=(1, 2)) is None
    assert prepare_flan(paths, tmp_path / "two", rows=15, shard=(0, 2)) == index
    assert flan_rows(tmp_path / "two") == flan_rows(tmp_path / "one")


def test_more_flan_rows_than_available_are_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        prepare_flan(write_tables(tmp_path / "in", (8,)), tmp_path / "out", rows=9)
    assert (caught.value.field, caught.value.value) == ("rows", 9)
