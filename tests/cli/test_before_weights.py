"""Wrong options and inputs of commands that load a model are errors before a weight is read."""

import json

import pytest

from scripts.make_eval_data import make_eval_data
from tests.quant.models import loud
from vila.core.errors import ConfigError, DataError, LayoutError, TemplateError, UnknownNameError
from vila.core.files import write_json
from vila.eval.runner import model_hash
from vila.model import loading
from vila.model.loading import save_model


@pytest.fixture(scope="module")
def loud_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("before") / "model"
    save_model(*loud(layers=1), folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "eval"
    make_eval_data(folder)
    return folder


class WeightsReadError(Exception):
    """A weight was read."""


@pytest.fixture
def no_weights(monkeypatch):
    def read(*_):
        raise WeightsReadError

    monkeypatch.setattr(loading, "read_tensors", read)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (("--group-size", "48"), ConfigError),
        (("--calib-data", "none.txt"), DataError),
        (("--calib-data", "starter/9_none"), UnknownNameError),
        (("--load-awq", "none.pt"), LayoutError),
        (("--template", "vicunna"), UnknownNameError),
        (("--device", "cuda:9"), UnknownNameError),
    ],
)
def test_quantize(vila_error, loud_model, tmp_path, no_weights, flags, error):
    command = ("quantize", loud_model, "--output", tmp_path / "out", *flags)
    assert isinstance(vila_error(*command), error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["awq-hf", "tinychat", "vila-v15", "llava-v1"])
def test_convert_to_a_layout_that_cannot_hold_the_model(vila_error, loud_model, tmp_path, no_weights, layout):
    # Full precision, and a DINOv2 tower.
    error = vila_error("convert", loud_model, tmp_path / "out", "--layout", layout)
    assert isinstance(error, LayoutError)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (("--benchmarks", "popee"), UnknownNameError),
        (("--benchmarks", ","), ConfigError),
        (("--benchmarks", "pope", "--data", "none"), DataError),
        (("--benchmarks", "pope,mme", "--data", "none"), DataError),
        (("--num-fewshot", "x"), ConfigError),
        (("--protocol", "mine"), ConfigError),
        (("--template", "vicunna"), UnknownNameError),
        (("--device", "tpu"), ConfigError),
        (("--device", "nothing"), ConfigError),
        (("--device", "cuda:99"), ConfigError),
        (("--lm-head-bits", "7"), ConfigError),
        (("--judge", "none.jsonl"), DataError),
        (("--judge", "ftp://x"), ConfigError),
        (("--base-url", "http://localhost:1"), ConfigError),
    ],
)
def test_eval(vila_error, loud_model, tmp_path, monkeypatch, no_weights, flags, error):
    monkeypatch.chdir(tmp_path)
    assert isinstance(vila_error("eval", loud_model, "--output", tmp_path / "out", *flags), error)
    assert not list(tmp_path.iterdir())


def test_eval_of_a_model_without_a_template(vila_error, data, tmp_path, no_weights):
    save_model(*loud(layers=1, template=""), tmp_path / "bare")
    error = vila_error("eval", tmp_path / "bare", "--benchmarks", "pope", "--data", data, "--output", tmp_path / "out")
    assert isinstance(error, TemplateError)


def test_eval_into_the_run_of_another_model(vila_error, loud_model, data, tmp_path, no_weights):
    out = tmp_path / "out"
    write_json(out / "pope" / "run.json", {"benchmark": "pope", "model": "other", "questions": 18, "template": ""})
    error = vila_error("eval", loud_model, "--benchmarks", "pope", "--data", data, "--output", out)
    assert isinstance(error, DataError)
    write_json(out / "pope" / "run.json", ["not", "an", "object"])
    error = vila_error("eval", loud_model, "--benchmarks", "pope", "--data", data, "--output", out)
    assert error.file == str(out / "pope" / "run.json")


def test_eval_resumes_a_run_of_another_backend(loud_model, data, tmp_path, no_weights, vila):
    """Which backend answers is known when the model is loaded; the exact comparison comes then."""
    model = f"{model_hash(loud_model)} onnx"
    facts = {"benchmark": "pope", "questions": 18, "template": "", "model": model}
    write_json(tmp_path / "out" / "pope" / "run.json", facts)
    with pytest.raises(WeightsReadError):
        vila("eval", loud_model, "--benchmarks", "pope", "--data", data, "--output", tmp_path / "out")


def test_the_default_group_size_follows_the_model(vila, tmp_path):
    """Widths 64 and 192: 128 divides neither."""
    folder, out = tmp_path / "model", tmp_path / "out"
    save_model(*loud(layers=1, hidden_size=64, intermediate_size=192), folder)
    code, _, err = vila("quantize", folder, "--output", out, "--method", "rtn")
    assert code == 0, err
    assert json.loads((out / "quantization.json").read_text())["group_size"] == 64
