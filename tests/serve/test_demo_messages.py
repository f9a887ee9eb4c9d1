"""Messages and chats of the demo, without a browser or server."""

import base64
import json
import threading
from pathlib import Path

import pytest
from PIL import Image

from vila.core.errors import MediaError
from vila.serve.demo.client import (
    MAX_BYTES,
    FewShotExample,
    Settings,
    StreamState,
    conversation,
    data_url,
    user_message,
)
from vila.serve.demo.gallery import SCENES, SHAPES, gallery_for, save_images, worked_examples
from vila.serve.demo.ui import (
    NONE,
    add_image,
    cells_of,
    last_question,
    run_side_by_side,
    shots_of,
    undo_question,
    with_answer,
)


@pytest.fixture
def image(tmp_path: Path) -> str:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def message(text, role="user"):
    return {"role": role, "content": text}


def file_of(path):
    return {"role": "user", "content": [{"type": "file", "file": {"path": path}}]}


def test_files_are_sent_unchanged(image):
    url = data_url(image)
    assert url.startswith("data:image/png;base64,")
    assert base64.b64decode(url.partition(",")[2]) == Path(image).read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.pdf", b"%PDF", "not a supported"),
        ("a.png", b"", "is empty"),
        ("a.png", bytes(MAX_BYTES + 1), "at most 20 MiB"),
    ],
)
def test_invalid_uploads_are_rejected_by_name(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MediaError, match=words) as caught:
        data_url(tmp_path / name)
    assert caught.value.file == name


def test_images_and_videos_precede_the_text(image, tmp_path):
    clip = tmp_path / "b.mp4"
    clip.write_bytes(b"clip")
    kinds = [part["type"] for part in user_message("what?", [image, clip, image])["content"]]
    assert kinds == ["image_url", "video_url", "image_url", "text"]


def test_consecutive_user_turns_are_merged(image):
    messages = conversation([file_of(image), file_of(image), message("two of what?")])
    assert [one["role"] for one in messages] == ["user"]
    assert [part["type"] for part in messages[0]["content"]] == ["image_url", "image_url", "text"]


def test_earlier_turns_keep_images_and_notices_are_not_sent(image):
    notice = {"role": "assistant", "content": "too large", "metadata": {"title": "The server refused"}}
    before = [file_of(image), message("one?"), message("a dot", "assistant"), message("two?")]
    chat = [*before, notice, message("and now?")]
    messages = conversation(chat, system="Be brief.")
    assert [one["role"] for one in messages] == ["system", "user", "assistant", "user"]
    assert messages[1]["content"][0]["type"] == "image_url"
    # The question that was refused is not sent again.
    assert messages[3]["content"] == [{"type": "text", "text": "and now?"}]


def test_an_empty_answer_is_shown_and_its_question_dropped(image):
    chat = with_answer([file_of(image), message("a?")], StreamState(done=True, tokens=0))
    assert chat[-1]["metadata"]["title"]
    assert with_answer([message("a?")], StreamState()) == [message("a?")]
    messages = conversation([*chat, message("b?")])
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "b?"}]}]


def test_unpaired_surrogates_are_replaced(image):
    half = "a\ud83d"
    messages = conversation(
        [message(half), message(half, "assistant"), message(half)],
        [FewShotExample("", half, half)],
        system=half,
    )
    json.dumps(messages, ensure_ascii=False).encode()
    assert messages[0]["content"] == "a\ufffd"
    assert conversation([message("\ud83d\ude00")])[0]["content"][0]["text"] == "\U0001f600"


def test_a_notice_without_metadata_of_the_page_is_an_answer():
    plain = {"role": "assistant", "content": "yes", "metadata": None}
    assert conversation([message("a?"), plain, message("b?")])[1] == {"role": "assistant", "content": "yes"}


def test_few_shot_examples_are_earlier_turns(image):
    shots = [FewShotExample(image, "red"), FewShotExample("", "no", "is it round?")]
    messages = conversation([message("what color?")], shots)
    assert [one["role"] for one in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert messages[0]["content"][-1]["text"] == "what color?"
    assert messages[2]["content"] == [{"type": "text", "text": "is it round?"}]
    assert messages[3]["content"] == "no"


def test_builder_fields_round_trip(image):
    shots = [FewShotExample(image, "red"), FewShotExample("", "no", "round?")]
    cells = cells_of(shots, 4)
    assert len(cells) == 12
    assert shots_of(cells) == shots
    assert shots_of([image, "  ", "a question without an answer"]) == []


def test_only_effective_settings_are_sent():
    assert Settings().parameters() == {"max_tokens": 256, "temperature": 0.0}
    assert Settings(5, 0.7, 0.9, 3).parameters() == {"max_tokens": 5, "temperature": 0.7, "top_p": 0.9, "seed": 3}


def test_errors_are_shown_and_never_sent():
    shown = with_answer([message("a?")], StreamState("half", problem="queue full", done=True))
    assert [turn["content"] for turn in shown] == ["a?", "half", "queue full"]
    assert [one["role"] for one in conversation([*shown, message("b?")])] == ["user", "assistant", "user"]


def test_speed_counts_the_tokens_after_the_first():
    state = StreamState("x", tokens=11, first=0.5, last=2.5, done=True)
    assert state.speed() == "first token 0.50 s · 5.0 tokens/s · 11 tokens"
    assert StreamState().speed() == ""


def test_two_answers_are_streamed_concurrently_and_fail_independently():
    meet = threading.Barrier(2, timeout=10)

    def growing(text):
        for end in range(1, len(text) + 1):
            if end == 1:
                meet.wait()  # both must be under way at once
            yield StreamState(text[:end], done=end == len(text))

    def failing():
        meet.wait()
        yield StreamState("so")
        raise RuntimeError("gone")

    last = list(run_side_by_side({"one": growing("answer"), "two": failing()}))[-1]
    assert last["one"] == StreamState("answer", done=True)
    assert last["two"].problem == "gone"


def test_undo_returns_the_question_with_its_images(image):
    one = [
        message("first?"),
        message("1", "assistant"),
        file_of(image),
        message("second?"),
        message("2", "assistant"),
    ]
    two = [file_of(image), message("second?"), message("zwei", "assistant")]
    question, one, two = undo_question(one, two)
    assert question == {"text": "second?", "files": [image]}
    assert [turn["content"] for turn in one] == ["first?", "1"]
    assert two == []
    assert last_question([]) == 0
    assert undo_question([], [])[0] == {"text": "", "files": []}


def test_a_camera_image_is_added_to_the_question(image):
    assert add_image({"text": "what?", "files": ["b.png"]}, image)["files"] == ["b.png", image]
    assert add_image(None, None) == {"text": "", "files": []}


def test_the_gallery_depends_on_the_training_data(tmp_path):
    assert gallery_for("runs/starter/model") is SHAPES
    assert gallery_for("my-model\ndatasets:\n- easy_vqa") is SHAPES
    assert gallery_for("VILA-7B") is SCENES
    for exhibits in (SHAPES, SCENES):
        for path, question in save_images(exhibits, tmp_path):
            with Image.open(path) as drawn:
                assert drawn.convert("RGB").getcolors(1 << 20) is not None
            assert question.endswith(("?", "."))


def test_the_images_of_all_examples_exist(tmp_path):
    for words in ("starter", "VILA-7B"):
        for shots in worked_examples(words, tmp_path / words).values():
            assert all(Path(shot.image).is_file() and shot.answer for shot in shots)


def test_the_none_choice_is_not_a_model_name():
    assert " " in NONE  # names of models have no spaces on a command line's default
