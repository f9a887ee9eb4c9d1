"""`vila info` counts what is there without reading it."""

import json
import re
import sys

import pytest
import torch
from transformers import LlamaConfig

from tests import tiny
from tests.cli.printed import counts, words
from tests.model.layouts.published import FIXTURES
from vila.cli.info import human_bytes
from vila.core.errors import LayoutError, UnknownNameError
from vila.engine.engine import Engine
from vila.model import weights
from vila.model.inspect import kv_elements_per_token
from vila.model.int4_weights import use_int4
from vila.model.layouts.detect import LAYOUTS
from vila.model.loading import load_model, save_model
from vila.quant.apply import quantize_model


def told(vila, *arguments):
    code, out, err = vila("info", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize(
    ("name", "layout", "storage"),
    [
        ("v1-float16", "llava-v1", ("bin, safetensors", 2)),
        ("v1-sharded-safetensors", "llava-v1", ("bin, safetensors", 4)),
        ("v15-s2", "vila-v15", ("safetensors", 3)),
        ("v15-intern-vit", "vila-v15", ("safetensors", 3)),
        ("v1-lora", "llava-v1", ("bin, safetensors", 5)),
    ],
)
def test_parts_have_the_parameters_and_bytes_of_the_loaded_model(vila, tmp_path, name, layout, storage):
    written = FIXTURES[name](tmp_path)
    base = ("--model-base", written.base) if written.base else ()
    facts = told(vila, written.folder, *base)
    model, processor = load_model(written.folder, base=written.base)
    half = "float16" if name == "v1-float16" else "float32"
    for part, module, kind in (
        ("vision tower", model.vision_tower, "float32"),
        ("projector", model.projector, half),
        ("LLM", model.language_model, half),
    ):
        numbers = sum(p.numel() for p in module.parameters())
        # InternViT's joined query, key and value are counted once.
        assert (facts["parts"][part]["parameters"], facts["parts"][part]["dtype"]) == (numbers, kind)
        assert facts["parts"][part]["bytes"] == numbers * getattr(torch, kind).itemsize
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["layout"] == layout
    assert (facts["storage"]["format"], facts["storage"]["files"]) == storage
    assert facts["tokens_per_image"] == processor.spec.tokens_per_image
    assert facts["memory"]["float32"]["weights"] == 4 * facts["parameters"]
    llm = facts["parts"]["LLM"]
    assert (llm["type"], llm["layers"], llm["width"], llm["vocabulary"]) == ("llama", 2, 64, 1200)
    assert facts["template"] is None


def test_a_tied_head_is_counted_once(vila, model):
    facts = told(vila, model)
    loaded, _ = load_model(model)
    assert facts["parameters"] == sum(p.numel() for p in loaded.parameters())
    assert (facts["template"], facts["context_length"], facts["dtype"]) == ("starter_qa", 512, "float32")


def test_the_kv_cache_is_as_large_as_the_engines(vila, model):
    engine = Engine.load(model, dtype="float32")
    ids = engine.processor.tokenizer("x" * 100, return_tensors="pt")["input_ids"]
    cache = engine.model.language_model(input_ids=ids, use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    memory = told(vila, model)["memory"]["float32"]
    assert memory["kv_cache_per_1000_tokens"] == 10 * held
    assert memory["kv_cache_full_context"] == 5.12 * held


def test_llama_7b_takes_half_a_megabyte_a_token():
    llm = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
    assert 2 * kv_elements_per_token(llm) == 2**19


def test_no_weight_is_read(vila, tmp_path, monkeypatch):
    folder = FIXTURES["v15-odd-grid"](tmp_path).folder

    def read(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(weights.SafetensorsFile, "open", read)
    assert told(vila, folder)["layout"] == "vila-v15"


def test_a_pipe_gets_plain_lines_and_a_terminal_tables_of_80_columns(vila, model, monkeypatch):
    code, plain, _ = vila("info", model)
    assert code == 0
    assert plain.isascii()
    lines = dict(line.split(maxsplit=1) for line in plain.splitlines())
    assert counts(lines["context"])["tokens"] == 512
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    code, coloured, _ = vila("info", model)
    shown = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert code == 0
    assert shown != coloured
    assert max(map(len, shown.splitlines())) <= 80
    for word in ("dinov2", "mlp2x_gelu", "llama", "starter_qa", "vocabulary", "KV cache, full context"):
        assert word in shown
        assert word in plain


def test_an_unknown_template_has_a_hint_with_the_option(vila, tmp_path):
    save_model(*tiny.vila(template=""), tmp_path / "bare")
    assert "--template" in words(vila("info", tmp_path / "bare")[1])
    assert told(vila, tmp_path / "bare", "--template", "chatml")["template"] == "chatml"


def test_directories_without_a_checkpoint_and_unknown_templates_are_named(vila_error, model, tmp_path):
    error = vila_error("info", tmp_path / "none")
    assert (type(error), error.file) == (LayoutError, str(tmp_path / "none"))
    error = vila_error("info", tmp_path)
    assert (type(error), error.file) == (LayoutError, str(tmp_path))
    assert words(error.expected) == set(LAYOUTS)
    error = vila_error("info", model, "--template", "v2")
    assert (type(error), error.name) == (UnknownNameError, "v2")


@pytest.mark.parametrize(
    ("fixture", "file", "changes"),
    [
        ("v1-mlp2x", "config.json", {"rope_scaling": {"type": "su", "factor": 2.0}}),
        ("v1-mlp2x", "config.json", {"rope_scaling": {"type": "linear"}}),
        ("v1-mlp2x", "config.json", {"mm_vision_tower": None}),
        ("v1-mlp2x", "config.json", {"num_hidden_layers": 200_000}),
        ("v1-mlp2x", "config.json", {"attention_bias": True}),
        ("v15-odd-grid", "llm/config.json", {"rope_scaling": {"type": "su"}}),
        ("v15-odd-grid", "config.json", {"mm_vision_select_layer": 9}),
    ],
)
def test_a_fault_that_stops_loading_is_reported(vila_error, tmp_path, fixture, file, changes):
    folder = FIXTURES[fixture](tmp_path).folder
    facts = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**facts, **changes}))
    with pytest.raises(LayoutError) as loading:
        load_model(folder)
    assert str(vila_error("info", folder)) == str(loading.value)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1024, "1 KiB"), (524288, "512 KiB"), (14126854144, "13.2 GiB")]
)
def test_sizes_are_short(size, text):
    assert human_bytes(size) == text


@pytest.mark.parametrize(("layout", "packing"), [("awq-hf", "gemm"), ("tinychat", "tinychat")])
def test_weights_in_4_bits_are_reported(vila, tmp_path, layout, packing):
    model, processor = tiny.vila(tower="clip", hidden_size=64, intermediate_size=128)
    numbers = sum(p.numel() for p in model.parameters())
    linears = quantize_model(model, None, 32)
    use_int4(model, linears)
    save_model(model, processor, tmp_path / "int4", layout)
    facts = told(vila, tmp_path / "int4")
    int4 = facts["int4"]
    assert (facts["layout"], facts["dtype"], int4["packing"], int4["group_size"]) == (layout, "int4", packing, 32)
    assert int4["linears"] == 14
    assert int4["parameters"] == sum(weight.num_inputs * weight.num_outputs for weight in linears.values())
    assert int4["memory"] == sum(weight.num_bytes for weight in linears.values())
    if packing == "gemm":
        groups = int4["parameters"] // 32
        assert int4["bytes"] == int4["parameters"] // 2 + 2 * groups + groups // 2
    # LLaVA's layouts have rows for <image>, and a head of their own.
    assert facts["parameters"] >= numbers
    assert facts["parts"]["LLM"]["dtype"] == "float16, int4"
    rest = facts["parameters"] - int4["parameters"]
    assert facts["memory"]["bfloat16"]["weights"] == 2 * rest + int4["memory"]
    code, out, _ = vila("info", tmp_path / "int4")
    assert code == 0
    (line,) = (line for line in out.splitlines() if line.startswith("INT4 "))
    assert words(line) >= {"14", "32", packing, "73,728"}
    assert human_bytes(int4["bytes"]) in line


def test_a_model_in_full_precision_has_no_weights_in_4_bits(vila, model):
    assert told(vila, model)["int4"] is None
