"""Messages, answers and examples of the demo, without a browser or Gradio."""

import asyncio
import base64
import json
from contextlib import aclosing
from pathlib import Path

import pytest
from PIL import Image

from tests.serve import fixtures
from vila.core.errors import MediaError
from vila.serve.demo.client import (
    MAX_BYTES,
    ApiClient,
    StreamState,
    conversation,
    data_url,
    sampling_parameters,
    side_by_side,
    user_message,
)
from vila.serve.demo.gallery import SCENES, SHAPES, few_shot_turns, gallery_for
from vila.serve.demo.ui import NONE, answer, answer_turns, before_question

GREEDY = sampling_parameters(8, 0, 1, 0)


@pytest.fixture
def image(tmp_path: Path) -> str:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def message(text, role="user"):
    return {"role": role, "content": text}


def shown(path, text):
    """A question in the format that Gradio passes back."""
    file = {"type": "file", "file": {"path": path, "mime_type": "image/png"}, "alt_text": None}
    return {"role": "user", "metadata": None, "content": [file, {"type": "text", "text": text}], "options": None}


def text_of(turns):
    return [turn["content"] for turn in turns]


def test_files_are_sent_unchanged(image):
    url = data_url(image)
    assert url.startswith("data:image/png;base64,")
    assert base64.b64decode(url.partition(",")[2]) == Path(image).read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.pdf", b"%PDF", "png"),
        ("a.png", b"", "20 MiB"),
        ("a.png", bytes(MAX_BYTES + 1), "20 MiB"),
    ],
)
def test_invalid_uploads_are_rejected_by_name(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MediaError) as caught:
        data_url(tmp_path / name)
    assert caught.value.file == name and expected in caught.value.expected


def test_images_and_videos_precede_the_text(image, tmp_path):
    clip = tmp_path / "b.mp4"
    clip.write_bytes(b"clip")
    kinds = [part["type"] for part in user_message("what?", [image, str(clip), image])["content"]]
    assert kinds == ["image_url", "video_url", "image_url", "text"]
    assert [part["type"] for part in user_message("", [image])["content"]] == ["image_url"]


def test_earlier_turns_keep_images_and_notices_are_not_sent(image):
    notice = {"role": "assistant", "content": "too large", "metadata": {"title": "Error"}}
    chat = [shown(image, "one?"), message("a dot", "assistant"), message("two?"), notice, message("and now?")]
    messages = conversation(chat, system="Be brief.")
    assert [one["role"] for one in messages] == ["system", "user", "assistant", "user"]
    assert [part["type"] for part in messages[1]["content"]] == ["image_url", "text"]
    # The question that was refused is not sent again.
    assert messages[3]["content"] == [{"type": "text", "text": "and now?"}]


def test_a_refused_file_does_not_refuse_later_questions(tmp_path):
    (tmp_path / "a.png").touch()
    refused = shown(str(tmp_path / "a.png"), "what?")
    with pytest.raises(MediaError):
        conversation([refused])
    assert len(conversation([refused, message("and now?")])) == 1


def test_an_empty_answer_is_shown_and_its_question_dropped():
    assert answer_turns(StreamState()) == []
    (notice,) = answer_turns(StreamState(done=True))
    assert notice["metadata"]["title"]
    messages = conversation([message("a?"), notice, message("b?")])
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "b?"}]}]


def test_errors_are_shown_as_text_and_never_sent():
    turns = answer_turns(StreamState("half", problem="<b>queue</b> full", done=True))
    assert text_of(turns) == ["half", "&lt;b&gt;queue&lt;/b&gt; full"]
    messages = conversation([message("a?"), *turns, message("b?")])
    assert [one["role"] for one in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == "half"


def test_unpaired_surrogates_are_replaced():
    half = "a\ud83d"
    messages = conversation([message(half), message(half, "assistant"), message(half)], system=half)
    json.dumps(messages, ensure_ascii=False).encode()
    assert messages[0]["content"] == "a\ufffd"
    assert conversation([message("\ud83d\ude00")])[0]["content"][0]["text"] == "\U0001f600"


def test_only_effective_settings_are_sent():
    assert sampling_parameters(256.0, 0, 0.9, 3) == {"max_tokens": 256, "temperature": 0}
    assert sampling_parameters(5, 0.7, 0.9, None) == {"max_tokens": 5, "temperature": 0.7, "top_p": 0.9, "seed": 0}


def test_speed_counts_the_tokens_after_the_first():
    state = StreamState("x", tokens=11, first=0.5, last=2.5, done=True)
    assert state.speed() == "first token 0.50 s · 5.0 tokens/s · 11 tokens"
    assert StreamState("x", tokens=1, first=0.5, last=0.5, done=True).speed() == "first token 0.50 s · 1 token"
    assert StreamState().speed() == ""


def test_two_answers_are_streamed_concurrently_and_cancelled_together():
    closed = []

    async def growing(name, meet, end):
        try:
            await meet.wait()  # both must be under way at once
            for length in range(1, end + 1):
                yield StreamState(name * length, done=length == end)
                await asyncio.sleep(0)
        finally:
            closed.append(name)

    async def states(ends, limit):
        meet = asyncio.Barrier(2)
        async with aclosing(side_by_side([growing("a", meet, ends[0]), growing("b", meet, ends[1])])) as updates:
            seen = []
            async for state in updates:
                seen.append(state)
                if len(seen) == limit:
                    break
        await asyncio.sleep(0.01)
        return seen

    assert asyncio.run(states((3, 1), None))[-1] == [StreamState("aaa", done=True), StreamState("b", done=True)]
    closed.clear()
    assert len(asyncio.run(states((100, 100), 4))) == 4
    assert sorted(closed) == ["a", "b"]


@pytest.fixture(scope="module")
def client(app):
    pytest.importorskip("openai", reason="needs pip install 'vila-vlm[demo]'")
    with fixtures.on_a_port(app) as port:
        yield ApiClient(f"http://127.0.0.1:{port}")


def outputs(client, prompt, chats, names):
    async def collect():
        # Connections of a client belong to the event loop that opened them.
        client_of_loop = ApiClient(client.base)
        return [output async for output in answer(client_of_loop, prompt, chats, names, "", GREEDY)]

    return asyncio.run(collect())


def test_the_models_of_the_server_are_listed(client):
    assert client.models()[0] == "tiny"


def test_two_models_are_asked_and_fail_independently(client, app, image):
    first, *_, last = outputs(client, {"text": "is it red", "files": [image]}, ([], []), ("tiny", "none"))
    question = {"role": "user", "content": [{"path": image}, "is it red"]}
    assert first == ([], [question], "", "")  # the question is shown at once
    one, two, speed, no_speed = last
    expected = fixtures.ask(app, messages=[user_message("is it red", [image])], max_tokens=8).json()
    assert text_of(one) == [expected["choices"][0]["message"]["content"]]
    assert speed.endswith(" 8 tokens")
    assert two[0] == question
    assert "none" in two[1]["content"]
    assert two[1]["metadata"]["title"]
    assert no_speed == ""


def test_a_single_model_is_asked_if_none_is_compared(client):
    one, two, _, speed = outputs(client, {"text": "yes", "files": []}, ([], []), ("tiny", NONE))[-1]
    assert [turn["role"] for turn in one] == ["assistant"]
    assert text_of(two) == [["yes"]]
    assert speed == ""


def test_a_retried_question_replaces_its_answer_in_the_second_chat(client, app, image):
    before = [message("first?"), message("1", "assistant")]
    two = [*before, shown(image, "second?"), message("2", "assistant")]
    # Gradio passes the files of an earlier question as mappings.
    prompt = {"text": "second?", "files": [{"path": image, "mime_type": "image/png"}]}
    chat = outputs(client, prompt, (before, two), ("tiny", "tiny"))[-1][1]
    expected = fixtures.ask(app, messages=conversation([*before, shown(image, "second?")]), max_tokens=8).json()
    answered = expected["choices"][0]["message"]["content"]
    assert text_of(chat) == ["first?", "1", [{"path": image}, "second?"], answered]


def test_an_empty_file_is_named_in_the_chat(client, tmp_path):
    (tmp_path / "empty.png").touch()
    one, *_ = outputs(client, {"text": "a?", "files": [str(tmp_path / "empty.png")]}, ([], []), ("tiny", NONE))[-1]
    assert "empty.png" in one[0]["content"]
    assert one[0]["metadata"]["title"]


def test_a_missing_server_is_named_in_the_chat():
    pytest.importorskip("openai", reason="needs pip install 'vila-vlm[demo]'")
    one, *_ = outputs(ApiClient("http://127.0.0.1:9"), {"text": "a?", "files": []}, ([], []), ("tiny", NONE))[-1]
    assert "http://127.0.0.1:9/v1" in one[0]["content"]
    assert one[0]["metadata"]["title"]


def test_a_chat_is_cut_before_a_question(image):
    chat = [message("first?"), message("1", "assistant"), shown(image, "second?"), message("2", "assistant")]
    assert before_question(chat, 0) == []
    assert before_question(chat, 1) == chat[:2]
    assert before_question(chat, 2) == chat


def test_few_shot_examples_are_earlier_turns(tmp_path):
    *shots, last = SHAPES.few_shot["Colour"]
    prompt = last.prompt(tmp_path)
    messages = conversation([*few_shot_turns(shots, tmp_path), message([{"path": prompt["files"][0]}, prompt["text"]])])
    assert [one["role"] for one in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert [one["content"] for one in messages[1::2]] == ["red", "blue"]
    assert all([part["type"] for part in one["content"]] == ["image_url", "text"] for one in messages[::2])


def test_the_gallery_depends_on_the_training_data():
    assert gallery_for("runs/starter/model") is SHAPES
    assert gallery_for("my-model\ndatasets:\n- easy_vqa") is SHAPES
    assert gallery_for("VILA-7B") is SCENES


@pytest.mark.parametrize("gallery", [SHAPES, SCENES])
def test_every_example_has_its_own_image_and_a_question(gallery, tmp_path):
    paths = set()
    for example in gallery.examples:
        prompt = example.prompt(tmp_path)
        assert prompt["text"].endswith(("?", "."))
        paths |= {*prompt["files"]}
        with Image.open(prompt["files"][0]) as drawn:
            assert len(drawn.convert("RGB").getcolors(1 << 20)) > 1
    assert len(paths) == len(gallery.examples)
    for *shots, last in gallery.few_shot.values():
        assert all(shot.answer for shot in shots)
        assert not last.answer
        assert last.prompt(tmp_path)["files"] != shots[0].prompt(tmp_path)["files"]
