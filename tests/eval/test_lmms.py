"""lmms-eval adapter, without lmms-eval: requests, settings and prompts."""

import subprocess
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
from PIL import Image as PilImage

from tests import tiny
from tests.eval.checks import refused
from vila.core.errors import ConfigError
from vila.core.types import Image, Message, Text, Video
from vila.engine.engine import Engine
from vila.engine.sampling_params import SamplingParams
from vila.eval import lmms
from vila.eval.lmms import LmmsAdapter, media_from_visual, message_parts, sampling_from_kwargs
from vila.media.image import open_image
from vila.model.loading import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("lmms") / "model"
    save_model(*tiny.vila(template="chatml", seed=1), path)
    return path


class Hook:
    def __init__(self):
        self.rows = []

    def add_partial(self, kind, request, text):
        self.rows.append((kind, request, text))


def loaded(folder, **arguments):
    adapter = LmmsAdapter(str(folder), dtype="float32", **arguments)
    adapter.cache_hook = Hook()
    adapter.task_dict = {"shapes": {"test": [{"image": open_image(tiny.image(n))} for n in range(5)]}}
    return adapter


def request(number, settings, text="what?"):
    arguments = (f"{text} {number}", settings, lambda doc: [doc["image"]], number, "shapes", "test")
    return SimpleNamespace(args=arguments)


def test_answers_are_the_engines_in_the_order_of_the_requests(folder):
    adapter = loaded(folder, batch_size="2")
    settings = [{"max_new_tokens": 4}, {"max_new_tokens": 4}, {"max_new_tokens": 4}, {"max_new_tokens": 2}, {}]
    requests = [request(number, each) for number, each in enumerate(settings)]
    engine = Engine.load(folder, dtype="float32")
    wanted = [
        engine.generate(
            [Message.of("user", tiny.image(number), f"\nwhat? {number}")],
            max_new_tokens=each.get("max_new_tokens", 128),
        )
        for number, each in enumerate(settings)
    ]
    assert len(set(wanted)) > 1  # the images matter
    assert adapter.generate_until(requests) == wanted
    assert [row[2] for row in adapter.cache_hook.rows] == wanted
    assert (adapter._rank, adapter._world_size, adapter.device) == (0, 1, "cpu")


def test_the_image_is_a_line_before_the_text():
    images = [Image("a.png"), Image("b.png")]
    assert message_parts("q", images[:1], "\n") == (images[0], Text("\nq"))
    assert message_parts("q", images, "\n") == (images[0], Text("\n"), images[1], Text("\nq"))
    assert message_parts("q", images[:1], "") == (images[0], Text("q"))
    assert message_parts("q", [], "\n") == (Text("q"),)
    assert message_parts("q", [Video("a.mp4")], "\n") == (Video("a.mp4"), Text("q"))


def test_markers_in_the_text_place_the_images():
    images = [Image("a.png"), Image("b.png")]
    assert message_parts("1: <image> 2: <image>?", images, "\n") == (
        Text("1: "),
        images[0],
        Text(" 2: "),
        images[1],
        Text("?"),
    )
    assert message_parts("<image>\nq", images[:1], "\n") == (images[0], Text("\nq"))
    assert message_parts("<image>", images, "\n")[-1] == Text("\n<image>")  # too few markers: text like any other


@pytest.mark.parametrize(
    ("given", "wanted", "rule"),
    [
        ({}, SamplingParams(max_new_tokens=128), "greedy, 128 tokens"),
        ({"until": ["\n\n"], "max_new_tokens": 16}, SamplingParams(max_new_tokens=16), "until is left out"),
        ({"temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}, SamplingParams(), "greedy spelt out"),
        ({"temperature": 0.7, "do_sample": False}, SamplingParams(), "do_sample false is greedy"),
        ({"temperature": 0.7, "top_p": 0.5}, SamplingParams(temperature=0.7, top_p=0.5), "drawn"),
        ({"max_gen_toks": 32, "top_p": None}, SamplingParams(max_new_tokens=32), "the older name of the limit"),
        ({"image_aspect_ratio": "original"}, SamplingParams(), "belongs to the checkpoint"),
    ],
)
def test_settings_of_tasks(given, wanted, rule):
    assert sampling_from_kwargs(given) == wanted


def test_unsupported_settings_are_refused():
    with refused(error=ConfigError, field="num_beams", value=5):
        sampling_from_kwargs({"num_beams": 5})
    with refused("length_penalty, typical_p", error=ConfigError, field="generation_kwargs"):
        sampling_from_kwargs({"typical_p": 1, "length_penalty": 2})


def test_media_from_visual():
    image = PilImage.new("RGB", (2, 2))
    assert media_from_visual(image, "t") == Image(image)
    assert media_from_visual("a.JPG", "t") == Image("a.JPG")
    assert media_from_visual("a.mp4", "t", 4) == Video("a.mp4", 4)
    with refused("dict", file="mme test 3"):
        media_from_visual({"array": []}, "mme test 3")


def test_arguments_are_checked():
    with refused("'pretraned'", "pretrained=DIRECTORY", error=ConfigError):
        LmmsAdapter(pretraned="x")


def test_unsupported_request_types(folder):
    adapter = loaded(folder)
    with pytest.raises(NotImplementedError):
        adapter.loglikelihood([])
    with pytest.raises(NotImplementedError):
        adapter.generate_until_multi_round([])


def test_the_entry_point_is_there_and_the_module_needs_no_lmms_eval():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["lmms_eval.models"].items()
    assert name == lmms.MODEL_ID
    assert EntryPoint(name, value, "lmms_eval.models").load() is lmms.manifest
    code = "import sys, vila.eval.lmms; assert 'lmms_eval' not in sys.modules and 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
