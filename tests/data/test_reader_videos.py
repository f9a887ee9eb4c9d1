"""Videos in training equal those of inference: same ids, placeholders and pixels; unreadable ones are counted."""

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
from tests.packed import split_conversations
from vila.chat.templates import TEMPLATES
from vila.chat.tokenize import IGNORE
from vila.core.errors import DataError, MediaError
from vila.core.types import Message, Sample, Video
from vila.data.collate import collate
from vila.data.dataset import DatasetEntry
from vila.data.packing import PackingPolicy, PackingStreams
from vila.model.processor import VilaProcessor

FILM = {"type": "video", "path": "film.mp4"}
KNOWN = {"{bos}", "{eos}"} | set(tiny.tokenizer().get_added_vocab())
SHORT = {"type": "video", "path": "short.gif", "num_frames": 3}
IMAGE = {"type": "image", "path": "p.png"}
YES = {"role": "assistant", "content": "yes"}


def asked(*content):
    return {"role": "user", "content": list(content)}


CONVERSATIONS = {
    "video and question": [asked(FILM, "What?"), YES],
    "newline after the video": [asked(FILM, "\nWhat?"), YES],
    "text before the video": [asked("Look: ", FILM, "What?"), YES],
    "images and videos mixed": [asked(IMAGE, SHORT, FILM, "What?", IMAGE), YES],
    "video in the second turn": [asked("Hi"), YES, asked(SHORT, "\nand?"), YES],
    "same video twice": [asked(SHORT, SHORT), YES, asked(SHORT), YES],
    "video at the end of the turn": [asked("What is in", FILM), YES],
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
    (tmp_path / "p.png").write_bytes(tiny.image(1, (40, 20)).source)
    return tmp_path


def records(folder, *rows, **how):
    path = write_lines(folder / "data.jsonl", [{"id": f"r{number}", **row} for number, row in enumerate(rows)])
    return reader_of(DatasetEntry("messages", str(path), **how))


def position_of(reader, name="r0"):
    return next(n for n in range(reader.mixture.epoch_length) if reader.mixture[n][1].id == name)


def processor(template, **spec):
    return VilaProcessor(tiny.tokenizer(), vision_spec=replace(SPEC, **spec).to_dict(), template=template)


EVERY_CASE = [(name, template) for name in CONVERSATIONS for template in ("starter_qa", "chatml", "page")]
# Templates whose special tokens the tokenizer of the tests has.
EVERY_CASE += [("images and videos mixed", name) for name, one in TEMPLATES.items() if one.special_tokens <= KNOWN]


@pytest.mark.parametrize(("name", "template"), dict.fromkeys(EVERY_CASE))
def test_ids_labels_and_placeholders_equal_those_of_the_processor(name, template, folder):
    sample = replace(records(folder, {"messages": CONVERSATIONS[name]}).mixture[0][1], template=template)
    reader = records(folder, {"messages": CONVERSATIONS[name], "template": template})
    ours = reader(0)
    theirs = processor(template).tokens(sample.messages, prompt=False)
    assert ours.ids.tolist() == theirs.ids
    assert ours.labels.tolist() == [IGNORE, *theirs.labels[1:]]
    placeholders = [index for start, count in theirs.runs for index in range(start, start + count)]
    assert np.flatnonzero(ours.is_placeholder).tolist() == placeholders
    assert len(ours.media) == len(theirs.media)


@pytest.mark.parametrize("mode", [None, "resize"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_pixels_equal_those_of_the_processor(name, mode, folder):
    reader = records(folder, {"messages": CONVERSATIONS[name]}, image_mode=mode)
    _, sample = reader.mixture[0]
    model = processor("starter_qa")
    expected = model.pixels([*model.tokens(sample.messages, prompt=False).media], mode)
    assert (expected[0] != expected[1]).any()
    assert torch.equal(torch.from_numpy(np.stack(reader.pixels(0, reader(0)))), expected)


def test_branches_about_a_video_equal_the_conversations_of_the_processor(folder):
    branches = [[asked("\nWhat?"), YES], [asked("Where?"), YES], [asked("\n"), YES]]
    reader = records(folder, {"messages": [asked(FILM)], "branches": branches, "template": "chatml"})
    theirs = [processor("chatml").tokens(one, prompt=False) for one in reader.mixture[0][1].conversations()]
    ours = reader(0)
    assert [ids.tolist() for ids, _ in split_conversations([ours])] == [tokens.ids for tokens in theirs]
    assert len(ours.media) == 8
    assert ours.is_placeholder.sum() == 8 * 4


def test_branches_that_share_only_the_first_frames_of_a_video_have_all_their_pixels(folder):
    # All text of a page is supervised, so each branch predicts its first letter from its own last frame.
    branches = [[asked("a")], [asked("b")]]
    reader = records(folder, {"messages": [asked(SHORT)], "branches": branches, "template": "page"})
    sample = reader(0)
    theirs = [processor("page").tokens(one, prompt=False) for one in reader.mixture[0][1].conversations()]
    assert [ids.tolist() for ids, _ in split_conversations([sample])] == [tokens.ids for tokens in theirs]
    expected = processor("page").pixels(theirs[0].media).numpy()
    assert np.array_equal(np.stack(reader.pixels(0, sample)), expected[[0, 1, 2, 2]])


def test_the_number_of_frames_is_that_of_the_model_unless_the_video_has_its_own(folder):
    reader = records(folder, {"messages": [asked(FILM), YES]}, {"messages": [asked(SHORT), YES]})
    for frames in (1, 5):
        model = replace(reader, spec=replace(SPEC, num_video_frames=frames))
        assert len(model(position_of(reader, "r0")).media) == frames
        assert len(model(position_of(reader, "r1")).media) == 3


@pytest.mark.parametrize("form", ["llava_json", "llava_json_v15", "video_json", "webdataset"])
def test_videos_of_every_format_are_tokenized_and_decoded(form, folder):
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "yes"}]
    if form == "webdataset":
        content = (folder / "film.mp4").read_bytes()
        path = write_tar(folder / "d.tar", [("a.mp4", content), ("a.txt", "yes")])
    else:
        path = write_list(folder / "d.json", [{"video": "film.mp4", "conversations": turns}])
    reader = reader_of(DatasetEntry(form, str(path), options={"num_frames": 4}))
    sample = reader(0)
    theirs = processor("starter_qa").tokens(reader.mixture[0][1].messages, prompt=False)
    assert sample.ids.tolist() == theirs.ids
    expected = processor("starter_qa").pixels(theirs.media)
    assert len(expected) == 4
    assert np.array_equal(np.stack(reader.pixels(0, sample)), expected)


def test_a_video_is_not_opened_before_its_pixels_are_read(folder):
    reader = records(folder, {"messages": [asked(IMAGE, FILM), YES]})
    (folder / "film.mp4").unlink()
    sample = reader(0)
    assert len(sample.media) == 1 + 8
    with pytest.raises(MediaError) as caught:
        reader.pixels(0, sample)
    assert caught.value.file == str(folder / "film.mp4")


@dataclass(frozen=True)
class Counted:
    """A stored video that counts how often it is read."""

    content: bytes
    name: str = "counted"
    reads: tuple = ()

    def read(self):
        _READS.append(self.name)
        return self.content


_READS: list[str] = []


def test_a_video_is_decoded_once_for_all_its_frames(folder):
    reader = records(folder, {"messages": [asked(FILM), YES]})
    stored = Counted((folder / "film.mp4").read_bytes())
    sample = Sample("s", (Message.of("user", Video(stored), "What?"), Message.of("assistant", "yes")))
    tokens = reader.tokenize(reader.mixture.datasets[0], sample)
    _READS.clear()
    reader.pixels(0, tokens)
    assert len(_READS) == 1
    _READS.clear()
    for image in tokens.media:
        image.key()
    assert len(_READS) == 1


def test_a_frame_can_be_used_as_any_image(folder):
    reader = records(folder, {"messages": [asked(SHORT), YES]})
    media = reader(0).media
    model = processor("starter_qa")
    assert torch.equal(model.pixels(media), model.pixels(model.frames(Video(folder / "short.gif", 3))))
    assert media[1].name.endswith("short.gif frame 2 of 3")
    assert len({image.key() for image in media}) == 3
    assert pickle.loads(pickle.dumps(media)) == media


def test_a_video_counts_as_its_frames_for_max_images(folder):
    reader = records(folder, {"messages": [asked(FILM), YES]})
    policy = PackingPolicy(max_length=96, look_ahead=1, max_images=7)
    with pytest.raises(DataError) as caught:
        PackingStreams(reader, 1, policy=policy).step()
    assert (caught.value.field, caught.value.value) == ("data.max_images", 8)


@pytest.mark.parametrize("content", [b"", b"no video at all", b"<!doctype html>gone", None])
def test_a_damaged_video_is_counted_and_named(content, folder):
    good = {"messages": [asked(SHORT, "What?"), YES]}
    reader = records(folder, good, {"messages": [asked(FILM, "What?"), YES]}, good)
    whole = (folder / "film.mp4").read_bytes()
    (folder / "film.mp4").write_bytes(whole[: len(whole) // 2] if content is None else content)
    stream = PackingStreams(
        reader,
        1,
        policy=PackingPolicy(max_length=300, look_ahead=3, max_faults=1, packing="none"),
        decode=reader.pixels,
    )
    sequences = [one for _ in range(2) for one in stream.step()]
    assert sorted(sample.id for one in sequences for sample in one) == ["r0", "r2"]
    reasons = [bad.reason for sequence in [*sequences, *stream.step()] for bad in sequence.bad_samples]
    assert len(reasons) == 1
    assert "sample 'r1'" in reasons[0] and "film.mp4" in reasons[0]
    assert collate(sequences).pixels.shape == (6, 3, 28, 28)
    strict = PackingStreams(reader, 1, policy=PackingPolicy(max_length=300, look_ahead=3), decode=reader.pixels)
    with pytest.raises(MediaError) as caught:
        [strict.step() for _ in range(3)]
    assert caught.value.file == str(folder / "film.mp4")


@pytest.mark.parametrize("frames", [4097, 10**9])
def test_more_frames_than_the_limit_are_an_error_before_the_video_is_opened(frames, folder):
    reader = records(folder, {"messages": [asked({**FILM, "num_frames": frames}), YES]})
    with pytest.raises(MediaError) as caught:
        reader(0)
    assert (caught.value.file, caught.value.value) == (str(folder / "film.mp4"), frames)


def test_the_largest_number_of_frames_is_accepted(folder):
    reader = records(folder, {"messages": [asked({**FILM, "num_frames": 4096}), YES]})
    assert len(reader(0).media) == 4096
