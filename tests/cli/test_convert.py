"""`vila convert`: equal logits in every layout, and no accidental overwrite."""

import json
import os
import signal

import pytest
import torch

from tests import tiny
from tests.cli.printed import counts, words
from tests.model.layouts.published import FIXTURES
from tests.other_process import killed_writer
from vila.cli.convert import INT4_LAYOUTS, READERS
from vila.core.errors import ConfigError, LayoutError
from vila.model.int4_weights import int4_weights, use_int4
from vila.model.layouts.detect import LAYOUTS, detect_layout
from vila.model.layouts.readme import layout_readme
from vila.model.loading import load_model, save_model
from vila.quant.apply import quantize_model


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return FIXTURES["v1-mlp2x"](tmp_path_factory.mktemp("published")).folder


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_a_command_that_is_terminated_leaves_nothing_half_written(vila, published, tmp_path, monkeypatch, command):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("vila.core.files._sync", lambda part: os.kill(os.getpid(), signal.SIGTERM))
    given = {
        "convert": (published, tmp_path / "out", "--layout", "native"),
        "quantize": (published, "--output", tmp_path / "out", "--method", "rtn", "--group-size", 32),
    }
    try:
        code, _, _ = vila(command, *given[command], "--template", "vicuna_v1")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 130
    assert not list(tmp_path.iterdir())


def test_every_layout_has_its_readers():
    assert {str(layout) for layout in READERS} == set(LAYOUTS)


@pytest.mark.parametrize("layout", [layout for layout in READERS if layout not in INT4_LAYOUTS])
def test_the_model_is_the_same_in_another_layout(vila, published, tmp_path, layout):
    target = tmp_path / "out"
    code, out, err = vila("convert", published, target, "--layout", layout, "--template", "vicuna_v1")
    assert code == 0, err
    assert detect_layout(target).name == layout
    assert words(out.splitlines()[0]) >= {str(target), layout, "float32"}
    assert READERS[layout] in out
    files = [path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()]
    assert counts(out)["files"] == len(files)
    assert words(out) >= set(files)
    before, _ = load_model(published)
    after, _ = load_model(target, template="vicuna_v1")
    ids = torch.tensor([[1, 5, 9, 11]])
    assert torch.equal(before(input_ids=ids).logits[..., :1200], after(input_ids=ids).logits[..., :1200])


COMMANDS = {
    "llava-hf": ("vllm serve .", "sglang.launch_server --model-path .", "AutoModelForImageTextToText"),
    "awq-hf": ("vllm serve .", "vila run .", "gptqmodel"),
    "tinychat": ("tinychat/vila10_demo.py", "--quant-path *-v2.pt", "--precision W4A16"),
}


@pytest.mark.parametrize("layout", COMMANDS)
def test_the_readme_has_commands_of_other_programs(vila, tmp_path, layout):
    model, processor = tiny.vila(tower="clip", hidden_size=64, intermediate_size=128)
    if layout in INT4_LAYOUTS:
        use_int4(model, quantize_model(model, None, 64))
    save_model(model, processor, tmp_path / "model", "awq-hf" if layout in INT4_LAYOUTS else "native")
    code, _, err = vila("convert", tmp_path / "model", tmp_path / "out", "--layout", layout)
    assert code == 0, err
    text = (tmp_path / "out" / "README.md").read_text()
    assert all(command in text for command in (*COMMANDS[layout], "## Versions", "## Known defects"))
    assert text.isascii()


def test_the_readme_leaves_out_programs_that_cannot_run_the_model():
    siglip, clip = tiny.vila(tower="siglip"), tiny.vila(tower="clip")
    assert "vllm serve" not in layout_readme("awq-hf", *siglip, "1")
    assert "vila15_demo.py --model-path MODEL_16_BIT --quant-path llm/*-v2.pt" in layout_readme(
        "tinychat", *siglip, "1"
    )
    assert layout_readme("native", *clip, "1") == ""


def test_dtype_and_template_are_written(vila, published, tmp_path):
    flags = ("--layout", "native", "--dtype", "float16", "--template", "llama_2")
    assert vila("convert", published, tmp_path / "out", *flags)[0] == 0
    facts = json.loads(vila("info", tmp_path / "out", "--json")[1])
    assert (facts["dtype"], facts["template"]) == ("float16", "llama_2")


def test_an_unknown_template_is_a_note_that_names_the_flag(vila, published, tmp_path):
    code, _, err = vila("convert", published, tmp_path / "out", "--layout", "native")
    assert code == 0
    assert "--template" in words(err)


def test_an_existing_model_is_replaced_only_with_overwrite(vila, vila_error, published, tmp_path):
    target = tmp_path / "out"
    save_model(*tiny.vila(), target)
    error = vila_error("convert", published, target, "--layout", "vila-v15")
    assert (type(error), error.file) == (ConfigError, str(target))
    assert detect_layout(target).name == "native"
    assert vila("convert", published, target, "--layout", "vila-v15", "--overwrite")[0] == 0
    assert detect_layout(target).name == "vila-v15"


def test_overwrite_never_replaces_other_directories(vila, vila_error, published, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("photos", "file"):
        error = vila_error("convert", published, tmp_path / name, "--layout", "native", "--overwrite")
        assert (type(error), error.file) == (ConfigError, str(tmp_path / name))
    assert (tmp_path / "photos" / "cat.png").exists()
    (tmp_path / "empty").mkdir()
    assert vila("convert", published, tmp_path / "empty", "--layout", "native", "--overwrite")[0] == 0


def test_the_source_is_never_overwritten(vila_error, tmp_path):
    outer = FIXTURES["v15-odd-grid"](tmp_path).folder
    inner = outer / "inner"
    save_model(*tiny.vila(), inner)
    for source, target in ((inner, inner), (inner, outer), (inner, inner / ".." / "inner")):
        error = vila_error("convert", source, target, "--layout", "native", "--overwrite")
        assert (type(error), error.file) == (ConfigError, str(target))
    assert detect_layout(inner).name == "native"
    assert detect_layout(outer).name == "vila-v15"


def test_errors_leave_no_files(vila_error, model, tmp_path):
    error = vila_error("convert", tmp_path / "none", tmp_path / "out", "--layout", "native")
    assert (type(error), error.file) == (LayoutError, str(tmp_path / "none"))
    error = vila_error("convert", model, tmp_path / "out", "--layout", "llava-v1")
    assert (type(error), error.field, error.value) == (LayoutError, "vision_config.model_type", "dinov2")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def int4_model(tmp_path):
    model, processor = tiny.vila(tower="clip", hidden_size=64, intermediate_size=128)
    use_int4(model, quantize_model(model, None, 32))
    save_model(model, processor, tmp_path / "int4", "awq-hf")
    return tmp_path / "int4"


def test_an_int4_model_stays_int4_in_an_int4_layout(vila, int4_model, tmp_path):
    code, out, err = vila("convert", int4_model, tmp_path / "chat", "--layout", "tinychat")
    assert code == 0, err
    assert words(out.splitlines()[0]) >= {str(tmp_path / "chat"), "tinychat", "INT4", "32", "float16"}
    before, after = load_model(int4_model)[0], load_model(tmp_path / "chat")[0]
    codes = int4_weights(after)
    assert all(torch.equal(weight.codes, codes[name].codes) for name, weight in int4_weights(before).items())


def test_dequantize_converts_an_int4_model_to_float_weights(vila, vila_error, int4_model, tmp_path):
    target = tmp_path / "out"
    error = vila_error("convert", int4_model, target, "--layout", "native")
    assert type(error) is LayoutError
    assert words(error.hint) >= {"awq-hf", "tinychat", "--dequantize"}
    assert not target.exists()
    code, out, err = vila("convert", int4_model, target, "--layout", "native", "--dequantize", "--dtype", "float32")
    assert code == 0, err
    assert words(out.splitlines()[0]) >= {str(target), "native", "float32"}
    ids = torch.tensor([[5, 9, 11]])
    plain, packed = load_model(target)[0], load_model(int4_model, dtype="float32")[0]
    torch.testing.assert_close(plain(input_ids=ids).logits, packed(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_int4_layouts_take_int4_models_only(vila_error, published, int4_model, tmp_path):
    error = vila_error("convert", published, tmp_path / "out", "--layout", "awq-hf")
    assert type(error) is LayoutError
    assert "awq-hf" in words(error.problem) and "quantize" in words(error.hint)
    error = vila_error("convert", int4_model, tmp_path / "out", "--layout", "tinychat", "--dequantize")
    assert (type(error), error.field) == (ConfigError, "--dequantize")


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_a_command_that_was_killed_while_replacing_a_model_puts_it_back(vila, published, tmp_path, command):
    out = tmp_path / "out"
    save_model(*tiny.vila(), out)
    killed_writer(out, replaced=True)
    given = {"convert": (published, out, "--layout", "native"), "quantize": (published, "--output", out)}
    code, _, _ = vila(command, *given[command])
    assert code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert detect_layout(out).name == "native"


@pytest.mark.parametrize("layout", ["gguf", "onnx", "tensorrt-llm", "compressed-tensors"])
def test_a_format_of_exports_points_to_vila_export(vila_error, model, tmp_path, layout):
    error = vila_error("convert", model, tmp_path / "out", "--layout", layout)
    assert (type(error), error.field, error.value) == (ConfigError, "--layout", layout)
    assert words(error.hint) >= {"export", str(model), "--format", layout}
