"""compressed-tensors: bit-exact in an independent reader, and loaded by transformers."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, CompressedTensorsConfig

from tests.export.models import random_search, rounded, write_model, write_search
from tests.export.readers.pack_quantized import read_weights
from vila.core.errors import LayoutError
from vila.core.reading import read_json
from vila.export.base import ExportOptions, write_export
from vila.export.source import open_source
from vila.quant.apply import apply_search

PRECISIONS = {"int4": False, "int4-symmetric": True}


def export(folder, out, precision="int4", search=None, group=32):
    source = open_source(folder, search=search)
    write_export(source, "compressed-tensors", out, ExportOptions(precision, group_size=group))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", list(PRECISIONS))
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_an_independent_reader_gets_the_quantized_values_bit_by_bit(tmp_path, family, precision, dtype):
    model, _ = write_model(tmp_path / "m", family, dtype=dtype)
    search = write_search(tmp_path, model, symmetric=PRECISIONS[precision])
    export(tmp_path / "m", tmp_path / "out", precision, search)
    apply_search(model, random_search(model))
    half = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    found = read_weights(tmp_path / "out")
    count = 0
    for name, tensor in model.language_model.model.layers.state_dict().items():
        is_linear = name.endswith("_proj.weight")
        count += is_linear
        values = rounded(tensor, 32, PRECISIONS[precision], half) if is_linear else tensor.to(half).float()
        assert (found[f"language_model.model.layers.{name}"] == values.numpy()).all(), name
    assert count == 14
    tower = model.vision_tower.state_dict()["encoder.layers.0.mlp.fc1.weight"]
    assert (found["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"] == tower.to(half).float().numpy()).all()


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_transformers_loads_and_runs_it(tmp_path, precision):
    model, _ = write_model(tmp_path / "m")
    export(tmp_path / "m", tmp_path / "out", precision)
    stock = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in model.language_model.model.layers.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.copy_(rounded(parameter, 32, PRECISIONS[precision]))
        ids = torch.tensor([[5, 9, 77, 30, 120, 6]])
        theirs, ours = stock(input_ids=ids).logits[..., :259], model(input_ids=ids).logits[..., :259]
    # All other weights are in float16 there. Measured: 0.020 at logits up to 15; INT4 itself moves them by 6.
    torch.testing.assert_close(theirs, ours, atol=0.05, rtol=0)


@pytest.mark.parametrize("tower", ["clip", "dinov2"])
def test_symmetric_files_load_without_dequantize(tmp_path, tower):
    write_model(tmp_path / "m", tower=tower)
    export(tmp_path / "m", tmp_path / "out", "int4-symmetric")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert stock(input_ids=torch.tensor([[5, 6]])).logits.isfinite().all()


def test_the_readme_of_a_dinov2_model_recommends_symmetric_int4_for_transformers(tmp_path):
    write_model(tmp_path / "m", tower="dinov2")
    export(tmp_path / "m", tmp_path / "out")
    assert "--precision int4-symmetric" in (tmp_path / "out" / "README.md").read_text()


def test_the_config_lists_what_is_quantized_and_what_is_not(tmp_path):
    write_model(tmp_path / "m")
    export(tmp_path / "m", tmp_path / "out", group=64)
    config = read_json(tmp_path / "out" / "config.json")
    quantization = config["quantization_config"]
    assert quantization["config_groups"]["group_0"]["weights"]["group_size"] == 64
    assert "re:.*vision_tower.*" in quantization["ignore"]
    assert config["dtype"] == "float16"


@pytest.mark.parametrize(
    ("facts", "group", "words"),
    [
        ({"symmetric": True}, 32, ["AWQ search", "symmetric", "asymmetric"]),
        ({}, 64, ["AWQ search", "32", "64"]),
        ({}, 48, ["group size 48", "64, 128 inputs", "--group-size 32 or 64"]),
    ],
)
def test_a_search_for_another_group_size_or_symmetry_is_an_error(tmp_path, facts, group, words):
    model, _ = write_model(tmp_path / "m")
    search = write_search(tmp_path, model, **facts)
    with pytest.raises(LayoutError) as caught:
        export(tmp_path / "m", tmp_path / "out", search=search, group=group)
    assert all(word in caught.value.problem for word in words)


def test_the_group_size_of_the_search_is_the_default(tmp_path):
    model, _ = write_model(tmp_path / "m")
    export(tmp_path / "m", tmp_path / "out", search=write_search(tmp_path, model), group=0)
    assert read_weights(tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 32
