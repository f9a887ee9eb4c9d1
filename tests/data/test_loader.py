"""From files to packed sequences with pixels: image modes, cutting, and unreadable samples."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.data.reading import SPEC, reader_of, write_records
from vila.core.errors import CheckpointError, DataError, MediaError
from vila.core.types import Image, Message, Sample
from vila.data.bad_samples import BadSample, BadSampleLog
from vila.data.collate import collate
from vila.data.dataset import DatasetEntry, shorten_sample
from vila.data.packing import PackingPolicy, PackingStreams, PackingStreamState
from vila.media.image import open_image
from vila.media.transform import pixels


@pytest.fixture
def file(tmp_path):
    return write_records(tmp_path)


def open_streams(reader, count=2, **changes):
    policy = PackingPolicy(**{"max_length": 96, "look_ahead": 6, **changes})
    return PackingStreams(reader, count, policy=policy, shorten=reader.shorten, decode=reader.pixels)


def test_pixels_of_a_batch_are_those_of_its_images_in_order(file):
    streams = open_streams(reader_of(file)).step()
    batch = collate(streams)
    assert len(batch.media) > 2
    expected = np.stack([pixels(open_image(image), SPEC) for image in batch.media])
    assert torch.equal(batch.pixels, torch.from_numpy(expected))


def test_the_image_mode_of_a_data_set_overrides_that_of_the_model(file):
    reader = reader_of(DatasetEntry("messages", str(file)), DatasetEntry("messages", str(file), image_mode="resize"))
    modes = set()
    for position in range(48):
        sample = reader(position)
        if not sample.media:
            continue
        mode = "resize" if sample.dataset == "data#2" else "pad"
        expected = pixels(open_image(sample.media[0]), replace(SPEC, image_mode=mode))
        assert np.array_equal(reader.pixels(position, sample)[0], expected)
        modes.add(mode)
    assert modes == {"pad", "resize"}
    assert not np.array_equal(
        *(pixels(open_image(Image(file.parent / "0.png")), replace(SPEC, image_mode=m)) for m in modes)
    )


def test_a_batch_of_text_has_no_pixels(tmp_path):
    path = tmp_path / "text.jsonl"
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path.write_text(json.dumps(row) + "\n")
    assert collate(open_streams(reader_of(path)).step()).pixels is None


def turns(number):
    return tuple(
        message for n in range(number) for message in (Message.of("user", f"q{n}"), Message.of("assistant", "a" * 10))
    )


def tokenizer_of(tmp_path):
    reader = reader_of(write_records(tmp_path, 1))
    return lambda sample: reader.tokenize(reader.mixture.datasets[0], sample)


def test_cutting_keeps_as_many_whole_turns_as_fit(tmp_path):
    tokenize = tokenizer_of(tmp_path)
    whole = Sample("a", turns(9))
    for kept in range(1, 9):
        expected = tokenize(Sample("a", turns(kept)))
        for room in (len(expected), len(tokenize(Sample("a", turns(kept + 1)))) - 1):
            cut = shorten_sample(whole, tokenize, room)
            assert np.array_equal(cut.ids, expected.ids)
    assert shorten_sample(whole, tokenize, len(tokenize(Sample("a", turns(1)))) - 1) is None


def test_cutting_removes_branches_from_the_end(tmp_path):
    tokenize = tokenizer_of(tmp_path)
    branches = tuple((Message.of("user", f"q{n}"), Message.of("assistant", "yes")) for n in range(5))
    head = (Message.of("user", "some text"),)
    expected = tokenize(Sample("a", head, branches[:3]))
    assert np.array_equal(shorten_sample(Sample("a", head, branches), tokenize, len(expected)).ids, expected.ids)
    assert shorten_sample(Sample("a", head, branches[:1]), tokenize, 5) is None


def test_cutting_removes_an_image_with_its_turn_and_never_cuts_it(file):
    reader = reader_of(file)
    shown = Image(file.parent / "0.png")
    later = (Message.of("user", shown, "and?"), Message.of("assistant", "no"))
    whole = Sample("a", (*turns(1), *later, *turns(1)))
    part = reader.mixture.datasets[0]

    def tokenize(sample):
        return reader.tokenize(part, sample)

    full = len(tokenize(whole))
    cuts = [shorten_sample(whole, tokenize, room) for room in range(full)]
    assert {len(cut.media) for cut in cuts if cut} == {0, 1}
    assert all(int(cut.is_placeholder.sum()) == 4 * len(cut.media) for cut in cuts if cut)


def test_overlong_samples_are_cut_and_counted(tmp_path):
    path = tmp_path / "long.jsonl"
    turns = [{"role": role, "content": "word " * 4} for _ in range(6) for role in ("user", "assistant")]
    path.write_text("".join(json.dumps({"id": str(n), "messages": turns[: 2 * n + 2]}) + "\n" for n in range(6)))
    streams = open_streams(reader_of(path), 1, max_length=150, overlong="truncate")
    step = [streams.step()[0] for _ in range(6)]
    assert all(len(sample) <= 150 for row in step for sample in row)
    assert streams.truncated > 0 == streams.dropped
    shown = [sample.id.split("/")[-1] for row in step for sample in row]
    assert set(shown) == set("012345")


def damage(file, number):
    (file.parent / f"{number}.png").write_bytes(b"\x89PNG broken")


def test_an_unreadable_image_is_an_error_with_data_set_sample_and_file(file):
    for number in range(24):
        damage(file, number)
    with pytest.raises(MediaError) as raised:
        open_streams(reader_of(file)).step()
    assert raised.value.file.endswith(".png")
    assert raised.value.record.startswith("data set 'data', sample 'r")


def test_bad_samples_within_the_budget_are_skipped_alone_and_listed(file, tmp_path):
    reader = reader_of(file)
    whole = open_streams(reader_of(file))
    before = [[[s.id for s in row] for row in whole.step()] for _ in range(6)]
    damage(file, 4)
    log = BadSampleLog(tmp_path / "run" / "faults.jsonl", 5)
    streams = PackingStreams(
        reader, 2, policy=PackingPolicy(max_length=96, look_ahead=6, max_faults=5), decode=reader.pixels, log=log
    )
    after = [[[s.id for s in row] for row in streams.step()] for _ in range(6)]
    bad = next(name for step in before for row in step for name in row if name.split("/")[-1] == "r4")
    assert after == [[[name for name in row if name != bad] for row in step] for step in before]
    assert streams.states == whole.states
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert len(lines) == log.count > 0
    assert all("4.png" in line["reason"] for line in lines)
    assert all(reader(line["position"]).id == bad for line in lines)


def bad(position, record=None):
    return BadSample(position, f"reason {position}", ("d.jsonl", position if record is None else record))


def test_more_bad_samples_than_allowed_are_an_error_with_the_log(tmp_path):
    log = BadSampleLog(tmp_path / "faults.jsonl", 1)
    assert log.add([bad(3)]) == 1
    with pytest.raises(DataError) as raised:
        log.add([bad(4)])
    assert (raised.value.file, raised.value.field) == (str(log.path), "data.max_faults")
    assert "reason 4" in raised.value.problem


def test_a_sample_counts_once_for_any_number_of_visits(tmp_path):
    log = BadSampleLog(tmp_path / "faults.jsonl", 2)
    # A step has the bad samples of all ranks; epochs and repeats read records 3 and 4 again.
    assert log.add([bad(3), bad(8, record=3)]) == 1
    assert log.add([bad(13, record=3), bad(4), bad(14, record=4)]) == 1
    assert log.add([bad(23, record=3), bad(24, record=4)]) == 0
    assert log.count == 2
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [(line["position"], line["file"], line["record"]) for line in lines] == [
        (3, "d.jsonl", 3),
        (4, "d.jsonl", 4),
    ]
    again = BadSampleLog(log.path, 2)
    assert again.count == 2 and again.add([bad(33, record=3)]) == 0
    with pytest.raises(DataError):
        again.add([bad(35)])


def test_a_resumed_run_drops_the_bad_samples_that_it_will_read_again(tmp_path):
    log = BadSampleLog(tmp_path / "faults.jsonl", 9)
    log.add([bad(n) for n in range(4)])
    log.path.write_text(log.path.read_text() + '{"position": 9, "rea')
    states = [PackingStreamState(4, ()), PackingStreamState(5, (3,))]
    from vila.train.build_data import visited_by

    again = BadSampleLog(log.path, 9, seen=visited_by(states))
    assert [json.loads(line)["position"] for line in log.path.read_text().splitlines()] == [0, 1, 2]
    assert again.count == 3


def test_a_log_of_version_one_counts_by_position(tmp_path):
    path = tmp_path / "faults.jsonl"
    path.write_text('{"position": 3, "reason": "x"}\n{"position": 4, "reason": "x"}\n')
    assert BadSampleLog(path, 9).count == 2


@pytest.mark.parametrize("line", ["not json", "[1]", "{}", '{"position": "3"}', '{"position": true}', '"cut \\ud83d"'])
def test_a_damaged_log_is_an_error_with_the_line(line, tmp_path):
    path = tmp_path / "faults.jsonl"
    path.write_text(f'{{"position": 3, "reason": "x"}}\n{line}\n')
    with pytest.raises(CheckpointError) as raised:
        BadSampleLog(path, 9)
    assert (raised.value.file, raised.value.record) == (str(path), "line 2")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("packing", ["rows", "none", "grouped"])
def test_a_damaged_sample_counts_once_over_epochs_and_repeats(file, tmp_path, world, packing):
    damage(file, 4)
    entries = [DatasetEntry("messages", str(file), repeat=2), DatasetEntry("messages", str(file))]
    log = BadSampleLog(tmp_path / "faults.jsonl", 1)
    policy = PackingPolicy(max_length=96, look_ahead=6, max_faults=1, packing=packing)
    reader = reader_of(*entries)
    ranks = [
        PackingStreams(
            reader, 2, policy=policy, rank=rank, world=world, decode=reader.pixels, location=reader.mixture.location
        )
        for rank in range(world)
    ]
    visits = 0
    while visits < 12:  # three per epoch
        found = [one for streams in ranks for sequence in streams.step() for one in sequence.bad_samples]
        log.add(found)
        visits += len(found)
    assert log.count == 1
    assert json.loads(log.path.read_text()) | {"position": 0, "reason": ""} == {
        "position": 0, "file": str(file), "record": 4, "reason": ""
    }  # fmt: skip


def test_a_second_damaged_sample_exceeds_a_budget_of_one_inside_a_stream_too(file):
    damage(file, 4)
    damage(file, 7)
    reader = reader_of(file)
    policy = PackingPolicy(max_length=96, look_ahead=6, max_faults=1)
    streams = PackingStreams(reader, 1, policy=policy, decode=reader.pixels, location=reader.mixture.location)
    with pytest.raises(DataError) as raised:
        for _ in range(24):
            streams.step()
    assert raised.value.field == "data.max_faults"


def test_a_record_that_is_not_json_counts_as_a_bad_sample(file):
    lines = file.read_text().splitlines()
    lines[7] = "x" * len(lines[7])
    file.write_text("\n".join(lines) + "\n")
    fresh = reader_of(file)
    streams = PackingStreams(fresh, 1, policy=PackingPolicy(max_length=96, look_ahead=40, max_faults=9))
    sequence = streams.step()[0]
    assert sequence.bad_samples
    assert f"{file}, record 7" in sequence.bad_samples[0].reason
