"""A clip in training is what it is at inference: the same ids, slots and pixels, and its faults are counted."""

import io
import pickle
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

from tests import tiny
from tests.data.reading import SPEC, reader_of
from tests.data.shards import write_lines, write_list, write_tar
from tests.media.test_video import video_bytes
from vila.chat.templates import TEMPLATES
from vila.chat.tokenize import IGNORE
from vila.core.errors import MediaError
from vila.core.types import Message, Sample, Video
from vila.data.collate import collate, split_conversations
from vila.data.dataset import Entry
from vila.data.packing import PackingPolicy, PackingStreams, compact
from vila.model.processor import VilaProcessor

FILM = {"type": "video", "path": "film.mp4"}
SHORT = {"type": "video", "path": "short.gif", "num_frames": 3}
PICTURE = {"type": "image", "path": "p.png"}
YES = {"role": "assistant", "content": "yes"}


def asked(*content):
    return {"role": "user", "content": list(content)}


CONVERSATIONS = {
    "a clip and a question": [asked(FILM, "What?"), YES],
    "a newline behind the clip": [asked(FILM, "\nWhat?"), YES],
    "text before the clip": [asked("Look: ", FILM, "What?"), YES],
    "pictures and clips mixed": [asked(PICTURE, SHORT, FILM, "What?", PICTURE), YES],
    "a clip later on": [asked("Hi"), YES, asked(SHORT, "\nand?"), YES],
    "one clip twice": [asked(SHORT, SHORT), YES, asked(SHORT), YES],
    "a clip that ends the turn": [asked("What is in", FILM), YES],
}


def short_gif():
    frames = [PilImage.new("RGB", (40, 20), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250), (9, 9, 9))]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:], duration=40)
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "film.mp4").write_bytes(video_bytes("mp4", "mpeg4", 20))
    (tmp_path / "short.gif").write_bytes(short_gif())
    (tmp_path / "p.png").write_bytes(tiny.picture(1, (40, 20)).source)
    return tmp_path


def records(folder, *rows, **how):
    path = write_lines(folder / "data.jsonl", [{"id": f"r{number}", **row} for number, row in enumerate(rows)])
    return reader_of(Entry("messages", str(path), **how))


def position_of(reader, name="r0"):
    return next(n for n in range(reader.mixture.epoch_length) if reader.mixture[n][1].id == name)


def processor(template, **spec):
    return VilaProcessor(tiny.tokenizer(), vision_spec=replace(SPEC, **spec).to_dict(), template=template)


# The same as at inference


EVERY_CASE = [(name, template) for name in CONVERSATIONS for template in ("starter_qa", "chatml", "page")]
EVERY_CASE += [("pictures and clips mixed", template) for template in TEMPLATES]


@pytest.mark.parametrize(("name", "template"), dict.fromkeys(EVERY_CASE))
def test_ids_labels_and_slots_are_the_processors(name, template, folder):
    sample = replace(records(folder, {"messages": CONVERSATIONS[name]}).mixture[0][1], template=template)
    reader = records(folder, {"messages": CONVERSATIONS[name], "template": template})
    ours = reader(0)
    theirs = processor(template).tokens(sample.messages, prompt=False)
    assert ours.ids.tolist() == theirs.ids
    assert ours.labels.tolist() == [IGNORE, *theirs.labels[1:]]
    runs = [place for start, slots in theirs.runs for place in range(start, start + slots)]
    assert np.flatnonzero(ours.is_placeholder).tolist() == runs
    assert len(ours.media) == len(theirs.media)


@pytest.mark.parametrize("mode", [None, "resize"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_pixels_are_the_processors(name, mode, folder):
    reader = records(folder, {"messages": CONVERSATIONS[name]}, image_mode=mode)
    _, sample = reader.mixture[0]
    model = processor("starter_qa")
    expected = model.pixels([*model.tokens(sample.messages, prompt=False).media], mode)
    assert (expected[0] != expected[1]).any()
    assert torch.equal(torch.from_numpy(np.stack(reader.pixels(0, compact(reader(0))))), expected)


def test_branches_about_a_clip_are_the_processors_conversations(folder):
    branches = [[asked("\nWhat?"), YES], [asked("Where?"), YES], [asked("\n"), YES]]
    reader = records(folder, {"messages": [asked(FILM)], "branches": branches, "template": "chatml"})
    theirs = [processor("chatml").tokens(one, prompt=False) for one in reader.mixture[0][1].conversations()]
    ours = reader(0)
    assert [ids.tolist() for ids, _ in split_conversations([ours])] == [tokens.ids for tokens in theirs]
    assert len(ours.media) == 8
    assert ours.is_placeholder.sum() == 8 * 4


def test_branches_that_share_only_the_first_frames_of_a_clip_have_all_their_pixels(folder):
    # All text of a page is learnt, so each branch predicts its first letter from a last frame of its own.
    branches = [[asked("a")], [asked("b")]]
    reader = records(folder, {"messages": [asked(SHORT)], "branches": branches, "template": "page"})
    sample = reader(0)
    theirs = [processor("page").tokens(one, prompt=False) for one in reader.mixture[0][1].conversations()]
    assert [ids.tolist() for ids, _ in split_conversations([sample])] == [tokens.ids for tokens in theirs]
    expected = processor("page").pixels(theirs[0].media).numpy()
    assert np.array_equal(np.stack(reader.pixels(0, compact(sample))), expected[[0, 1, 2, 2]])


def test_the_number_of_frames_is_the_models_unless_the_clip_has_its_own(folder):
    reader = records(folder, {"messages": [asked(FILM), YES]}, {"messages": [asked(SHORT), YES]})
    for frames in (1, 5):
        model = replace(reader, spec=replace(SPEC, num_video_frames=frames))
        assert len(model(position_of(reader, "r0")).media) == frames
        assert len(model(position_of(reader, "r1")).media) == 3


@pytest.mark.parametrize("form", ["llava_json", "llava_json_v15", "video_json", "webdataset"])
def test_clips_of_every_format_reach_the_rows(form, folder):
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "yes"}]
    if form == "webdataset":
        content = (folder / "film.mp4").read_bytes()
        path = write_tar(folder / "d.tar", [("a.mp4", content), ("a.txt", "yes")])
    else:
        path = write_list(folder / "d.json", [{"video": "film.mp4", "conversations": turns}])
    reader = reader_of(Entry(form, str(path), options={"num_frames": 4}))
    sample = reader(0)
    theirs = processor("starter_qa").tokens(reader.mixture[0][1].messages, prompt=False)
    assert sample.ids.tolist() == theirs.ids
    expected = processor("starter_qa").pixels(theirs.media)
    assert len(expected) == 4
    assert np.array_equal(np.stack(reader.pixels(0, compact(sample))), expected)


# Late and once


def test_a_clip_is_not_opened_before_its_pixels_are_wanted(folder):
    reader = records(folder, {"messages": [asked(PICTURE, FILM), YES]})
    (folder / "film.mp4").unlink()
    sample = reader(0)
    assert len(sample.media) == 1 + 8
    with pytest.raises(MediaError, match=r"film.mp4.*no such file"):
        reader.pixels(0, compact(sample))


@dataclass(frozen=True)
class Counted:
    """A stored clip that notes how often it is read."""

    content: bytes
    name: str = "counted"
    reads: tuple = ()

    def read(self):
        _READS.append(self.name)
        return self.content


_READS: list[str] = []


def test_a_clip_is_decoded_once_for_all_its_frames(folder):
    reader = records(folder, {"messages": [asked(FILM), YES]})
    stored = Counted((folder / "film.mp4").read_bytes())
    sample = Sample("s", (Message.of("user", Video(stored), "What?"), Message.of("assistant", "yes")))
    tokens = reader.tokenise(reader.mixture.datasets[0], sample)
    _READS.clear()
    reader.pixels(0, compact(tokens))
    assert len(_READS) == 1
    _READS.clear()
    for image in tokens.media:
        image.key()
    assert len(_READS) == 1


def test_a_frame_is_a_picture_of_its_own_for_everyone_else(folder):
    reader = records(folder, {"messages": [asked(SHORT), YES]})
    media = reader(0).media
    model = processor("starter_qa")
    assert torch.equal(model.pixels(media), model.pixels(model.frames(Video(folder / "short.gif", 3))))
    assert media[1].name.endswith("short.gif picture 2 of 3")
    assert len({image.key() for image in media}) == 3
    assert pickle.loads(pickle.dumps(media)) == media


def test_a_clip_counts_as_its_frames_among_the_pictures_of_a_row(folder):
    reader = records(folder, {"messages": [asked(FILM), YES]})
    policy = PackingPolicy(max_length=96, look_ahead=1, max_images=7)
    with pytest.raises(Exception, match=r"sample 'r0' has 8 images, rows hold 7"):
        PackingStreams(reader, 1, policy=policy).step()


# Faults


@pytest.mark.parametrize("content", [b"", b"no video at all", b"<!doctype html>gone", None])
def test_a_broken_clip_is_a_fault_that_is_counted_and_named(content, folder):
    good = {"messages": [asked(SHORT, "What?"), YES]}
    reader = records(folder, good, {"messages": [asked(FILM, "What?"), YES]}, good)
    whole = (folder / "film.mp4").read_bytes()
    (folder / "film.mp4").write_bytes(whole[: len(whole) // 2] if content is None else content)
    lanes = PackingStreams(
        reader,
        1,
        policy=PackingPolicy(max_length=300, look_ahead=3, max_faults=1, packing="none"),
        decode=reader.pixels,
    )
    rows = [row for _ in range(2) for row in lanes.step()]
    assert sorted(sample.id for row in rows for sample in row) == ["r0", "r2"]
    faults = [fault.reason for row in [*rows, *lanes.step()] for fault in row.bad_samples]
    assert len(faults) == 1
    assert "sample 'r1'" in faults[0] and "film.mp4" in faults[0]
    assert collate(rows).pixels.shape == (6, 3, 28, 28)
    with pytest.raises(MediaError, match="film.mp4"):
        strict = PackingStreams(reader, 1, policy=PackingPolicy(max_length=300, look_ahead=3), decode=reader.pixels)
        [strict.step() for _ in range(3)]


@pytest.mark.parametrize("frames", [4097, 10**9])
def test_more_frames_than_a_clip_can_give_are_refused_before_it_is_opened(frames, folder):
    reader = records(folder, {"messages": [asked({**FILM, "num_frames": frames}), YES]})
    with pytest.raises(MediaError, match=rf"film.mp4.*num_frames: got {frames}"):
        reader(0)


def test_as_many_frames_as_a_clip_can_give_are_accepted(folder):
    reader = records(folder, {"messages": [asked({**FILM, "num_frames": 4096}), YES]})
    assert len(reader(0).media) == 4096
