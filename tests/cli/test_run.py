"""`vila run`: prompts from flags, files and standard input; errors come before weights are read."""

import io
import json
import sys

import pytest
from PIL import Image as PilImage

from tests import tiny
from tests.cli.printed import counts, words
from tests.model.test_exif_orientation import sideways, stored, upright
from vila.cli import run
from vila.core.errors import ConfigError, ContextOverflowError, DataError, Interrupted, MediaError, TemplateError
from vila.core.types import Image, Message
from vila.engine.engine import Engine
from vila.engine.sampling_params import SamplingParams
from vila.model.loading import save_model


def asked(vila, *arguments, **more):
    """The one JSON object of a run."""
    code, out, err = vila("run", *arguments, "--json", "--dtype", "float32", **more)
    assert code == 0, err
    return json.loads(out)


def direct(model, messages, **options):
    """What the engine answers to messages built by hand."""
    return Engine.load(model, dtype="float32").complete([messages], **options)[0]


def test_run_streams_the_text_that_json_holds(vila, model, image):
    arguments = ("run", model, "-i", image, "-p", "what?", "--max-new-tokens", 8, "--dtype", "float32")
    code, streamed, err = vila(*arguments)
    assert (code, err) == (0, "")
    facts = json.loads(vila(*arguments, "--json")[1])
    expected = direct(model, [Message.of("user", Image(image), "what?")], max_new_tokens=8)
    assert streamed == facts["text"] + "\n"
    assert facts == {
        "text": expected.text,
        "finish": expected.finish,
        "prompt_tokens": 4 + len("what?"),
        "tokens": len(expected.ids),
    }


def test_images_are_turned_upright_unless_the_model_was_trained_without(vila, model, tmp_path):
    (tmp_path / "a.png").write_bytes(sideways())
    engine = Engine.load(model, dtype="float32")
    save_model(engine.model, engine.processor.with_vision(exif_orientation=False), tmp_path / "ignoring")
    arguments = ("-i", tmp_path / "a.png", "-p", "what?", "--max-new-tokens", 8)
    texts = []
    for folder, image in ((model, upright()), (tmp_path / "ignoring", stored())):
        expected = direct(model, [Message.of("user", Image(image), "what?")], max_new_tokens=8)
        assert asked(vila, folder, *arguments)["text"] == expected.text
        texts.append(expected.text)
    assert texts[0] != texts[1]


def test_an_image_is_followed_by_the_gap_of_the_template(vila, tmp_path, image):
    folder = tmp_path / "chatml"
    save_model(*tiny.vila(template="chatml"), folder)
    got = asked(vila, folder, "-i", image, "-p", "what?", "--max-new-tokens", 4)
    expected = direct(folder, [Message.of("user", Image(image), "\nwhat?")], max_new_tokens=4)
    assert (got["text"], got["prompt_tokens"]) == (expected.text, expected.prompt_tokens)


def test_markers_in_the_prompt_say_where_media_go(vila, model, image, tmp_path):
    other = tmp_path / "q.png"
    other.write_bytes(tiny.image(2).source)
    got = asked(vila, model, "-i", image, "-i", other, "-p", "a <image> b <image> c", "--max-new-tokens", 6)
    parts = ("a ", Image(image), " b ", Image(other), " c")
    assert got["text"] == direct(model, [Message.of("user", *parts)], max_new_tokens=6).text


@pytest.mark.parametrize("text", ["<image>?", "<video>?", "<image>\n<image>\nwhich?"])
def test_a_marker_without_media_is_refused_before_the_model_is_opened(vila_error, text):
    error = vila_error("run", "no/model", "-p", text)
    assert (type(error), error.field) == (MediaError, "--prompt")
    assert words(error.hint) >= {"--image", "--messages"}


@pytest.mark.parametrize("key", ["image", "images", "videos"])
def test_media_beside_the_messages_of_a_file_are_refused_and_not_forgotten(vila_error, tmp_path, key):
    path = tmp_path / "turn.json"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "<image>?"}], key: ["p.png"]}))
    error = vila_error("run", "no/model", "--messages", path)
    assert (error.file, error.field) == (str(path), key)


def test_text_that_spells_a_marker_can_be_asked_as_a_message(vila, model, tmp_path):
    (tmp_path / "turn.json").write_text(json.dumps([{"role": "user", "content": "<image>?"}]))
    got = asked(vila, model, "--messages", tmp_path / "turn.json", "--max-new-tokens", 1)
    assert got["prompt_tokens"] == len("<image>?")


@pytest.mark.parametrize("frames", [(), ("--num-video-frames", 3)])
def test_a_video_becomes_its_frames(vila, model, tmp_path, frames):
    video = tmp_path / "c.gif"
    images = [PilImage.new("RGB", (28, 28), (20 * n, 0, 0)) for n in range(12)]
    images[0].save(video, save_all=True, append_images=images[1:])
    turn = {"role": "user", "content": [{"type": "video", "path": "c.gif"}, {"type": "text", "text": "what?"}]}
    (tmp_path / "turn.json").write_text(json.dumps([turn]))
    for question in (("--video", video, "-p", "<video>what?"), ("--messages", tmp_path / "turn.json")):
        got = asked(vila, model, *question, "--max-new-tokens", 1, *frames)
        assert got["prompt_tokens"] == 4 * (3 if frames else 8) + len("what?")


@pytest.mark.parametrize("arguments", [("-p", "-"), ()])
def test_the_question_comes_through_a_pipe(vila, model, arguments):
    got = asked(vila, model, *arguments, "--max-new-tokens", 1, stdin="\ufeffgr\u00fcn?\n".encode())
    assert got["prompt_tokens"] == len("gr\u00fcn?".encode())


def test_a_pipe_that_is_not_utf8_names_the_byte(vila_error, model):
    error = vila_error("run", model, stdin=b"gr\xfcn?")
    assert (type(error), error.file) == (DataError, "standard input")
    assert words(error.problem) >= {"3", "0xfc"}


@pytest.mark.parametrize("arguments", [(), ("-p", "-")])
@pytest.mark.parametrize("stdin", [b"", b" \n"])
def test_an_empty_standard_input_is_no_question(vila_error, model, image, monkeypatch, arguments, stdin):
    for media in ((), ("-i", image)):
        error = vila_error("run", model, *media, *arguments, stdin=stdin)
        assert (type(error), error.field) == (ConfigError, "standard input")


@pytest.mark.parametrize("flag", ["--prompt", "--query"])
def test_an_empty_question_without_media_is_refused(vila_error, model, flag):
    assert vila_error("run", model, flag, " ").field == flag


def test_an_empty_prompt_asks_about_the_image_alone(vila, model, image):
    got = asked(vila, model, "-i", image, "-p", "", "--max-new-tokens", 1)
    assert got["prompt_tokens"] == 4


def test_a_closed_standard_input_is_an_empty_one(vila_error, model, image):
    error = vila_error("run", model, "-i", image, stdin=None)
    assert (type(error), error.field) == (ConfigError, "standard input")


def test_a_terminal_is_not_read_for_a_question(vila_error, model, image):
    class Terminal(io.BytesIO):
        def isatty(self):
            return True

    assert vila_error("run", model, "-i", image, stdin=Terminal(b"x")).field == "--prompt"


def test_a_directory_in_place_of_standard_input_is_named(vila_error, model):
    class Folder(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            raise IsADirectoryError(21, "Is a directory")

    assert vila_error("run", model, stdin=Folder()).file == "standard input"


def test_messages_of_a_file_start_their_paths_at_its_folder(vila, model, image, tmp_path, monkeypatch):
    turns = [
        {"role": "user", "content": [{"type": "image", "path": "p.png"}, {"type": "text", "text": "one?"}]},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": [{"type": "text", "text": "two?"}, {"type": "image", "image": "p.png"}]},
    ]
    (tmp_path / "plain.json").write_text(json.dumps(turns))
    (tmp_path / "object.json").write_text(json.dumps({"messages": turns}))
    monkeypatch.chdir("/")
    expected = [
        Message.of("system", "be kind"),
        Message.of("user", Image(image), "one?"),
        Message.of("assistant", "1"),
        Message.of("user", "two?", Image(image)),
    ]
    wanted = direct(model, expected, max_new_tokens=5)
    for name in ("plain.json", "object.json"):
        got = asked(vila, model, "--messages", tmp_path / name, "--system", "be kind", "--max-new-tokens", 5)
        assert (got["text"], got["prompt_tokens"]) == (wanted.text, wanted.prompt_tokens)


def test_sampling_flags_reach_the_engine(vila, model):
    seen = []

    def complete(engine, conversations, sampling):
        seen.append(sampling)
        raise KeyboardInterrupt

    flags = (
        "--max-new-tokens 7 --temperature 0.5 --top-k 4 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.2 "
        "--stop a --stop b --seed 3 --logprobs 2 --truncate"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "complete", complete)
        code, _, _ = vila("run", model, "-p", "x", "--json", *flags.split())
    assert (code, type(vila.error)) == (130, Interrupted)
    assert seen == [SamplingParams(7, 0.5, 4, 0.9, 0.1, 1.2, ("a", "b"), 2, 3, "truncate")]


def test_logprobs_name_their_tokens(vila, model):
    got = asked(vila, model, "-p", "x", "--max-new-tokens", 2, "--logprobs", 3)
    first = got["logprobs"][0]
    assert len(got["logprobs"]) == got["tokens"] == 2
    assert len(first["top"]) == 3
    assert first["top"][0] == {key: first[key] for key in ("id", "token", "logprob")}


def test_truncate_drops_the_oldest_turns_and_prints_their_number(vila, vila_error, model, tmp_path):
    turns = []
    for number in range(4):
        turns += [{"role": "user", "content": "q" * 150}, {"role": "assistant", "content": str(number)}]
    turns.append({"role": "user", "content": "last?"})
    (tmp_path / "long.json").write_text(json.dumps(turns))
    arguments = ("run", model, "--messages", tmp_path / "long.json", "--max-new-tokens", 4)
    error = vila_error(*arguments)
    assert type(error) is ContextOverflowError
    assert words(error.hint) >= {"--truncate", "--max-new-tokens"}
    code, _, err = vila(*arguments, "--truncate")
    assert code == 0
    assert counts(err)["oldest"] == 2
    assert json.loads(vila(*arguments, "--truncate", "--json")[1])["dropped_messages"] == 2


PAGE = b"<!DOCTYPE html><html></html>"
FILES = {
    "page.png": PAGE,
    "broken.json": b'{"messages": [}',
    "roles.json": b'[{"role": "assistant", "content": "x"}]',
    "latin.json": b'[{"role": "user", "content": "gr\xfcn"}]',
    "nopic.json": b'[{"role": "user", "content": [{"type": "image", "path": "none.png"}]}]',
    "system.json": b'[{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]',
    "half.json": b'[{"role": "user", "content": "\\ud800"}]',
}


@pytest.mark.parametrize(
    ("arguments", "code", "where"),
    [
        (("-p", "x"), 2, "MODEL"),
        (("{tmp}/none", "-p", "x"), 1, "{tmp}/none"),
        (("{tmp}", "-p", "x"), 1, "{tmp}"),
        (("{tmp}/page.png", "-p", "x"), 1, "{tmp}/page.png"),
        (("{model}",), 2, "standard input"),
        (("{model}", "-p", "x", "-i", "{tmp}/none.png"), 1, "{tmp}/none.png"),
        (("{model}", "-p", "x", "-i", "{tmp}/page.png"), 1, "{tmp}/page.png"),
        (("{model}", "-p", "x", "--video", "{tmp}/none.mp4"), 1, "{tmp}/none.mp4"),
        (("{model}", "-p", "x", "--video", "{tmp}"), 1, "{tmp}"),
        (("{model}", "-p", "x", "--template", "vicuna"), 2, "{model}"),
        (("{model}", "-p", "x", "--temperature", "-1", "--top_p", "2"), 2, "sampling"),
        (("{model}", "-p", "x" * 600), 1, "600"),
        (("{model}", "-p", "\udcff"), 2, "--prompt"),
        (("{model}", "-p", "x", "--system", "\udcff"), 2, "the system text"),
        (("{model}", "-p", "x", "--shot", "text=\udcff"), 2, "--shot 1"),
        (("{model}", "-p", "x", "--shot", "text=a", "question=\udcff"), 2, "--shot 1"),
        (("{model}", "-p", "x", "--dtype", "float8"), 2, "--dtype"),
        (("{model}", "-p", "x", "--device", "tpu"), 2, "--device"),
        (("{model}", "-p", "x", "--logprobs", "2"), 2, "--logprobs"),
        (("{model}", "-p", "x", "--output", "{tmp}/a"), 2, "--output"),
        (("{model}", "-p", "x", "--messages", "{tmp}/roles.json"), 2, "--messages"),
        (("{model}", "-i", "a", "--messages", "{tmp}/roles.json"), 2, "--image"),
        (("{model}", "--shot", "text=a", "--messages", "{tmp}/roles.json"), 2, "--shot"),
        (("{model}", "--messages", "{tmp}/none.json"), 1, "{tmp}/none.json"),
        (("{model}", "--messages", "{tmp}/broken.json"), 1, "{tmp}/broken.json"),
        (("{model}", "--messages", "{tmp}/latin.json"), 1, "{tmp}/latin.json"),
        (("{model}", "--messages", "{tmp}/half.json"), 1, "{tmp}/half.json"),
        (("{model}", "--messages", "{tmp}/roles.json"), 1, "{tmp}/roles.json"),
        (("{model}", "--messages", "{tmp}/nopic.json"), 1, "{tmp}/nopic.json"),
        (("{model}", "--system", "x", "--messages", "{tmp}/system.json"), 2, "--system"),
        (("{model}", "-p", "<image>a<image>", "-i", "{tmp}/p.png"), 1, "--prompt"),
        (("{model}", "-p", "<video>", "-i", "{tmp}/p.png"), 1, "--prompt"),
        (("{model}", "-p", "x", "--shot", "image={tmp}/none.png", "text=a"), 1, "{tmp}/none.png"),
    ],
)
def test_bad_input_is_an_error_before_any_weight_is_read(
    vila_error, model, image, tmp_path, monkeypatch, arguments, code, where
):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)

    def read_weights(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(run, "load_engine", read_weights)
    error = vila_error("run", *(a.format(tmp=tmp_path, model=model) for a in arguments))
    assert error.exit_code == code
    location = where.format(tmp=tmp_path, model=model)
    assert location == (error.file or error.field) or location in words(error.problem)


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (("-p", "x", "-i", "none.png"), "none.png"),
        (("-p", "x", "--video", "none.mp4"), "none.mp4"),
        (("-p", "<image>", "-i", "p.png", "-i", "p.png"), "--prompt"),
        (("--messages", "turns.json"), "turns.json"),
    ],
)
def test_prompt_errors_are_raised_before_a_model_is_opened(
    vila_error, model, image, tmp_path, monkeypatch, arguments, where
):
    turn = {"role": "user", "content": [{"type": "video", "path": "none.mp4"}]}
    (tmp_path / "turns.json").write_text(json.dumps([turn]))

    def open_model(*_):
        raise AssertionError("a model was opened")

    monkeypatch.setattr(run, "open_model", open_model)
    monkeypatch.chdir(tmp_path)
    error = vila_error("run", model, *arguments)
    assert isinstance(error, MediaError)
    assert where == (error.file or error.field)


def test_cuda_without_a_cuda_device_is_an_error(vila_error, model, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    error = vila_error("run", model, "-p", "x", "--device", "cuda")
    assert (type(error), error.field, error.value) == (ConfigError, "--device", "cuda")


def test_a_model_without_a_template_asks_for_one(vila, vila_error, tmp_path):
    save_model(*tiny.vila(template=""), tmp_path / "bare")
    error = vila_error("run", tmp_path / "bare", "-p", "x")
    assert (type(error), error.field) == (TemplateError, "template")
    assert "--template" in words(error.hint)
    assert vila("run", tmp_path / "bare", "-p", "x", "--template", "starter_qa", "--max-new-tokens", 1)[0] == 0


def test_an_answer_that_the_terminal_cannot_show_is_shown_all_the_same(vila, model, monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(run, "stripped", lambda events: ["gr\u00fcn"])
    assert vila("run", model, "-p", "x")[0] == 0
    assert screen.buffer.getvalue() == b"gr?n\n"
