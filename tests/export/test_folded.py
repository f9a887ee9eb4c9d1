"""Folded weights are an ordinary LLaVA model: the same outputs, and bit by bit the weights of `apply_search`."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.export.models import random_search, write_model, write_search
from tests.export.readers.safetensors_file import read_folder
from vila.export.base import ExportOptions, write_export
from vila.export.source import open_source
from vila.model.loading import load_model, save_model
from vila.quant.apply import apply_search
from vila.quant.awq_cache import AwqSearch

IDS = torch.tensor([[5, 9, 77, 30, 120, 6]])


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_without_a_search_it_equals_the_layout_llava_hf_bit_by_bit(tmp_path, projector):
    model, processor = write_model(tmp_path / "m")
    if projector == "linear":
        model.config.projector_type = "linear"
        model.projector = torch.nn.Linear(16, 64)
        save_model(model, processor, tmp_path / "m")
    # As it is read: a tokenizer remembers where it came from.
    save_model(*load_model(tmp_path / "m"), tmp_path / "hf", layout="llava-hf")
    write_export(open_source(tmp_path / "m"), "safetensors", tmp_path / "out")
    found, expected = read_folder(tmp_path / "out"), read_folder(tmp_path / "hf")
    assert found.keys() == expected.keys()
    wide = [name for name in expected if "embed_tokens" in name or "lm_head" in name]
    for name in expected:
        rows = 259 if name in wide else len(expected[name])
        assert (found[name][:rows] == expected[name][:rows]).all(), name
        assert abs(found[name] - expected[name]).max() < 1e-7, name
    for path in (tmp_path / "hf").glob("*.json"):
        assert (tmp_path / "out" / path.name).read_text() == path.read_text(), path.name


def test_transformers_gives_the_logits_of_the_original_model(tmp_path):
    model, _ = write_model(tmp_path / "m", num_key_value_heads=4)
    scales = AwqSearch(random_search(model).scales, ())
    from vila.quant.awq_cache import save_search

    save_search(scales, tmp_path / "s")
    write_export(open_source(tmp_path / "m", search=tmp_path / "s"), "safetensors", tmp_path / "out")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        folded, plain = stock(input_ids=IDS).logits[..., :259], model(input_ids=IDS).logits[..., :259]
    # Measured: 1.4e-5, at logits up to 12, float32.
    torch.testing.assert_close(folded, plain, atol=5e-5, rtol=1e-5)
    weight = stock.model.language_model.layers[0].mlp.down_proj.weight
    assert not torch.equal(weight, model.language_model.model.layers[0].mlp.down_proj.weight)


def test_scales_and_limits_are_applied_bit_by_bit(tmp_path):
    model, _ = write_model(tmp_path / "m", dtype=torch.bfloat16)
    search = write_search(tmp_path, model)
    write_export(open_source(tmp_path / "m", search=search), "safetensors", tmp_path / "out")
    apply_search(model, random_search(model))
    found = read_folder(tmp_path / "out")
    for name, tensor in model.language_model.model.layers.state_dict().items():
        assert (found[f"language_model.model.layers.{name}"] == tensor.float().numpy()).all(), name


def test_precision_converts_the_dtype(tmp_path):
    write_model(tmp_path / "m")
    write_export(open_source(tmp_path / "m"), "safetensors", tmp_path / "out", ExportOptions("float16"))
    assert {str(tensor.dtype) for tensor in read_folder(tmp_path / "out").values()} == {"float16"}
