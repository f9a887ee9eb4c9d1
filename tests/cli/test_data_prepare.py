"""`vila data prepare`: every command on small releases, interrupted and resumed, and its flags."""

import inspect
import io
import json
import zipfile
from dataclasses import asdict, fields

import pytest
from PIL import Image

from tests.cli.printed import cells, words
from tests.cli.printed import counts as printed_counts
from tests.prepare.image_server import jpeg, serving
from tests.prepare.test_coyo import write_table
from tests.prepare.test_m3it_flan import row, write_lines, write_tables
from tests.prepare.test_pkl import write as write_pickle
from tests.prepare.test_records_json import record
from tests.prepare.test_resumable_download import document, write_shard
from vila.cli.data_prepare import DownloadFlags
from vila.core.errors import DataError
from vila.prepare import coyo, llava_json, mmc4, pkl, vflan, work_units
from vila.prepare.resumable_download import ResizeRule
from vila.prepare.shards import read_tar

SETS = {name for names in vflan.SETS.values() for name in names}
FETCH = ("--allow-private-urls", "--host-delay-s", 0, "--max-attempts", 1)


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.fixture
def prepare(vila):
    """Calls a step: exit status, the counts of the table it prints last, standard output, standard error."""

    def call(*arguments):
        code, out, err = vila("data", "prepare", *arguments)
        return code, {name: int(number.replace(",", "")) for name, number in cells(out)}, out, err

    return call


def samples(folder):
    return {one.key: dict(one.members) for file in sorted(folder.glob("*.tar")) for one in read_tar(file)}


def test_mmc4_is_downloaded_shrunk_and_sharded_as_asked(prepare, vila_error, server, tmp_path):
    pages = [document(server.home, "/good/1", "/missing"), document(server.home, "/large/2"), {"text_list": 1}]
    shard = write_shard(tmp_path / "a.jsonl", pages)
    flags = ("--samples-per-shard", 1, "--short-side", 100, "--quality", 50, "--delete-intermediate", *FETCH)
    code, counts, out, err = prepare("mmc4", shard, "--output", tmp_path / "o", *flags)
    assert code == 0, err
    assert (counts["in"], counts["out"], counts["noted: http_404"]) == (3, 2, 1)
    assert counts["dropped: text_list is not a list of sentences"] == 1
    assert (printed := printed_counts(out))["samples"] == printed["files"] == 2
    with Image.open(io.BytesIO(samples(tmp_path / "o")["a-000002"]["0.jpg"])) as shrunk:
        assert shrunk.size == (200, 100)
    assert not (tmp_path / "o" / "parts").exists()
    code, counts, _, _ = prepare("mmc4", shard, "--output", tmp_path / "p", "--drop-incomplete", *FETCH)
    assert (code, counts["out"], counts["dropped: an image failed"]) == (0, 1, 1)
    changed = ("--short-side", 0, "--drop-incomplete")
    error = vila_error("data", "prepare", "mmc4", shard, "--output", tmp_path / "p", *changed, *FETCH)
    assert (error.exit_code, error.file, error.field) == (2, str(tmp_path / "p"), "short_side")
    assert (error.value, error.expected) == (None, "336")


def test_coyo_is_chosen_and_downloaded_by_two_workers(prepare, vila_error, server, tmp_path):
    paths = [write_table(tmp_path / f"p{n}.parquet", server.home, [0.9, 0.8, 0.7, 0.1]) for n in range(2)]
    flags = ("--output", tmp_path / "o", "--keep-fraction", 0.5, "--rows-per-list", 1, *FETCH)
    code, counts, out, err = prepare("coyo", *paths, "--shard", "0/2", *flags)
    assert (code, counts) == (0, {}), err
    code, counts, _, _ = prepare("coyo", *paths, "--shard", "1/2", *flags)
    assert (code, counts["in"], counts["out"]) == (0, 8, 4)  # rows of the tables; no index yet
    # Each worker downloads, and then each writes its shards; whoever comes last writes the index.
    for worker in ("0/2", "1/2", "0/2"):
        code, counts, out, err = prepare("coyo", *paths, "--shard", worker, *flags)
    assert (code, counts["in"], counts["out"]) == (0, 4, 4), err
    # Two tables: of all rows, and of those of the lists.
    assert [int(row[1]) for row in cells(out) if row[0] in ("in", "out")] == [8, 4, 4, 4]
    assert [members["txt"] for members in samples(tmp_path / "o").values()] == [b"caption 0", b"caption 1"] * 2
    error = vila_error("data", "prepare", "coyo", *paths, "--output", tmp_path / "o", "--keep-fraction", 0.1, *FETCH)
    changed = {problem.field: (problem.value, problem.expected) for problem in error.problems}
    assert (error.exit_code, changed) == (2, {"share": (0.1, "0.5"), "rows_per_unit": (12_440, "1")})
    error = vila_error("data", "prepare", "coyo", *paths, "--output", tmp_path / "q", "--min-clip-score", 1.5, *FETCH)
    assert (type(error), error.file) == (DataError, str(tmp_path / "q" / "lists"))
    assert error.field == "--min-clip-score"


def test_m3it_takes_the_training_files_of_its_sets(prepare, vila_error, tmp_path):
    write_lines(tmp_path / "gqa" / "train.jsonl", [row(), row(outputs="")])
    write_lines(tmp_path / "gqa" / "val.jsonl", [row()] * 3)
    write_lines(tmp_path / "clevr" / "train.jsonl", [row()])
    error = vila_error("data", "prepare", "m3it", tmp_path, "--output", tmp_path / "o")
    assert (error.exit_code, error.file) == (2, str(tmp_path))
    assert words(error.problem) & SETS == SETS - {"gqa", "clevr"}
    assert "--dataset" in words(error.hint)
    code, counts, _, err = prepare(
        "m3it", tmp_path, "--output", tmp_path / "o", "--dataset", "gqa", "--dataset", "clevr"
    )
    assert code == 0, err
    assert counts == {"in": 3, "out": 2, "dropped: no answer": 1}
    assert sorted(samples(tmp_path / "o")) == ["clevr-0000-0000001", "gqa-0000-0000001"]


def test_flan_rows_are_taken_and_a_bad_worker_is_named(prepare, vila_error, tmp_path):
    paths = write_tables(tmp_path / "in", (5, 4))
    code, counts, out, err = prepare(
        "flan", *paths, "--output", tmp_path / "o", "--num-rows", 9, "--samples-per-shard", 4
    )
    assert code == 0, err
    assert counts == {"in": 9, "out": 8, "dropped: no question or no answer": 1}
    assert ((printed := printed_counts(out))["samples"], printed["files"]) == (8, 2)
    assert len((tmp_path / "o" / "flan-000000.jsonl").read_text().splitlines()) == 4
    assert str(tmp_path / "o" / "log" / "failures.jsonl") in words(out)
    error = vila_error("data", "prepare", "flan", *paths, "--output", tmp_path / "p", "--shard", "2/2")
    assert (error.exit_code, error.field, error.value) == (2, "--shard", "2/2")


def test_llava_align_unpacks_and_keeps_whole_records(prepare, tmp_path):
    (tmp_path / "chat.json").write_text(json.dumps([record("a"), record("b"), record("c"), record("a", answer="")]))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a.jpg", jpeg(1))
        archive.writestr("b.jpg", jpeg(1)[:100])
    command = ("llava-align", tmp_path / "chat.json", "--images", tmp_path / "images.zip")
    code, counts, _, err = prepare(*command, "--output", tmp_path / "o", "--decode-images")
    assert code == 0, err
    reasons = {"dropped: an empty answer": 1, "dropped: an image is missing": 1, "dropped: not an image": 1}
    assert counts == {"in": 4, "out": 1, **reasons}
    assert (tmp_path / "o" / "images" / "a.jpg").is_file()
    assert prepare(*command, "--output", tmp_path / "p")[1]["out"] == 2


def test_sharegpt4v_leaves_out_sam_unless_it_is_kept(prepare, vila_error, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps([record("1"), record("sa_2")]))
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    code, counts, _, err = prepare("sharegpt4v", tmp_path / "s.json", "--output", tmp_path / "o")
    assert code == 0, err
    assert counts == {"in": 2, "out": 1, "dropped: an SA-1B image": 1}
    assert len(json.loads((tmp_path / "o" / "s.json").read_text())) == 1
    kept = ("sharegpt4v", tmp_path / "s.json", "--keep-sam")
    assert prepare(*kept, "--output", tmp_path / "p")[1] == {"in": 2, "out": 2}
    checked = prepare(*kept, "--output", tmp_path / "q", "--image-root", tmp_path, "--decode-images")[1]
    assert checked == {"in": 2, "out": 1, "dropped: an image is missing": 1}
    error = vila_error("data", "prepare", *kept, "--output", tmp_path / "r", "--decode-images")
    assert (error.exit_code, error.field) == (2, "--decode-images")
    assert "--image-root" in words(error.problem)


def test_pickles_become_shards_of_their_kind(prepare, tmp_path):
    write_pickle(tmp_path / "in", "part", [{"text": "one", "image": jpeg(1)}, {"text": "two"}])
    command = ("pkl", tmp_path / "in", "--output", tmp_path / "o", "--kind")
    code, counts, out, err = prepare(*command, "coyo")
    assert code == 0, err
    assert counts == {"in": 2, "out": 1, "dropped: no image": 1}
    assert samples(tmp_path / "o")["part-000001"]["txt"] == b"one"


def test_after_ctrl_c_the_same_command_resumes(prepare, tmp_path, monkeypatch):
    paths = write_tables(tmp_path / "in", (3, 3, 3))
    command = ("flan", *paths, "--num-rows", 5, "--output")
    real, parts = work_units.write_unit, []

    def press(out, unit, *rest):
        if parts:
            raise KeyboardInterrupt
        parts.append(unit)
        real(out, unit, *rest)

    monkeypatch.setattr(work_units, "write_unit", press)
    assert prepare(*command, tmp_path / "o")[0] == 130
    monkeypatch.setattr(work_units, "write_unit", lambda out, unit, *rest: (parts.append(unit), real(out, unit, *rest)))
    code, counts, _, _ = prepare(*command, tmp_path / "o")
    assert (code, counts["in"], parts) == (0, 5, ["flan-00000", "flan-00001", "flan-00002"])
    prepare(*command, tmp_path / "whole")
    name = "flan-000000.jsonl"
    assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


STEPS = {
    "mmc4": [mmc4.prepare_mmc4],
    "coyo": [coyo.select_coyo, coyo.prepare_coyo],
    "m3it": [vflan.prepare_m3it],
    "flan": [vflan.prepare_flan],
    "llava-align": [llava_json.prepare_llava_align],
    "sharegpt4v": [llava_json.prepare_sharegpt4v],
    "pkl": [pkl.convert_pickles],
}
FLAG_NAMES = {
    "share": "keep_fraction",
    "threshold": "min_clip_score",
    "rows_per_unit": "rows_per_list",
    "rows": "num_rows",
    "per_shard": "samples_per_shard",
    "keep_parts": "keep_intermediate",
    "decode": "decode_images",
    "images": "image_root",
}
"""Flags by the parameter of the function that they set, where the names differ."""


@pytest.mark.parametrize("command", STEPS)
def test_every_option_of_a_step_is_a_flag_with_help_and_its_default(command):
    from typer.main import get_command

    from vila.cli.data_prepare import app

    flags = {one.name: one for one in get_command(app).commands[command].params}
    assert all(one.help for one in flags.values())
    for step in STEPS[command]:
        for name, option in inspect.signature(step).parameters.items():
            if option.default is inspect.Parameter.empty or name in ("events", "shard"):
                continue
            if name == "download":
                assert {one.name: flags[one.name].default for one in fields(DownloadFlags)} == asdict(option.default)
            elif name == "resize":
                assert {one.name: flags[one.name].default for one in fields(ResizeRule)} == option.default.settings
            else:
                assert flags[FLAG_NAMES.get(name, name)].default == option.default
