"""Rounding a model block by block: equal to `quantize_model`, better with GPTQ, resumable."""

import pytest
import torch

from tests.quant.models import logits, loud, random_rows
from vila.core.errors import CheckpointError, ConfigError, LayoutError
from vila.kernels.int4 import dequantize
from vila.model.int4_weights import int4_weights, use_int4
from vila.quant.apply import quantize_model
from vila.quant.awq_search import search_model
from vila.quant.blocks import block_linears, decoder_blocks
from vila.quant.quant_config import QuantConfig
from vila.quant.quantize import check_calibration, check_quantization, round_blocks

ROWS = random_rows(4)
NEAREST = QuantConfig(group_size=16)
GPTQ = QuantConfig(group_size=16, rounding="gptq")


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(getattr(first[name], part), getattr(second[name], part))
        for name in first
        for part in ("codes", "scales", "zeros")
    )


def damage(model, search, options):
    """Mean squared change of the logits, on sequences that are not in the calibration."""
    rows = random_rows(4, seed=9)
    before = logits(model, rows)
    use_int4(model, round_blocks(model, search, options, ROWS).weights)
    return float((logits(model, rows) - before).square().mean())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_nearest_is_what_quantize_model_gives_and_leaves_a_model_that_fits(family):
    search = search_model(loud(family, layers=2)[0], ROWS, QuantConfig(group_size=16))
    model, other = loud(family, layers=2)[0], loud(family, layers=2)[0]
    rounded = round_blocks(model, search, NEAREST, release=True)
    assert same(rounded.weights, quantize_model(other, search, 16))
    assert all(one.weight.is_meta for block in decoder_blocks(model) for one in block_linears(block).values())
    use_int4(model, rounded.weights)
    assert same(int4_weights(model), rounded.weights)
    for name, weight in rounded.weights.items():
        other.get_submodule(name).weight.data = dequantize(weight)
    torch.testing.assert_close(logits(model, ROWS), logits(other, ROWS))


def test_a_16_bit_model_is_folded_and_rounded_in_float32():
    model, wide = loud(layers=1)[0].to(torch.bfloat16), loud(layers=1)[0].to(torch.bfloat16).float()
    search = search_model(wide, ROWS, QuantConfig(group_size=16))
    rounded = round_blocks(model, search, NEAREST)
    assert same(rounded.weights, round_blocks(wide, search, NEAREST).weights)
    assert decoder_blocks(model)[0].input_layernorm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gptq_does_less_damage_than_nearest(family, symmetric):
    searched = QuantConfig(group_size=16, symmetric=symmetric)
    search = search_model(loud(family, layers=2)[0], ROWS, searched)
    left = [
        damage(loud(family, layers=2)[0], search, QuantConfig(group_size=16, symmetric=symmetric, rounding=rounding))
        for rounding in ("nearest", "gptq")
    ]
    assert left[1] < left[0]


def test_gptq_resumes_from_its_finished_blocks_to_the_same_codes(tmp_path):
    whole = round_blocks(loud(layers=3)[0], None, GPTQ, ROWS, resume_dir=tmp_path / "whole")
    again = round_blocks(loud(layers=3)[0], None, GPTQ, ROWS, resume_dir=tmp_path / "whole")
    assert same(whole.weights, again.weights)
    assert whole.errors == again.errors
    (tmp_path / "whole" / "00002.safetensors").unlink()
    assert same(whole.weights, round_blocks(loud(layers=3)[0], None, GPTQ, ROWS, resume_dir=tmp_path / "whole").weights)
    with pytest.raises(CheckpointError) as caught:
        round_blocks(loud(layers=3, seed=1)[0], None, GPTQ, ROWS, resume_dir=tmp_path / "whole")
    assert caught.value.file.endswith("00000.safetensors")
    with pytest.raises(CheckpointError) as caught:
        round_blocks(loud(layers=3)[0], None, GPTQ, random_rows(4, seed=1), resume_dir=tmp_path / "whole")
    assert caught.value.file.endswith("00000.safetensors")
    (tmp_path / "whole" / "00001.safetensors").write_bytes(b"x")
    with pytest.raises(LayoutError) as caught:
        round_blocks(loud(layers=3)[0], None, GPTQ, ROWS, resume_dir=tmp_path / "whole")
    assert caught.value.file == str(tmp_path / "whole" / "00001.safetensors")


def test_what_cannot_be_rounded_is_refused():
    model, _ = loud(layers=1)
    search = search_model(model, ROWS, QuantConfig(group_size=16))
    for config, found, rows, field in (
        (QuantConfig(group_size=24), None, None, "group_size"),
        (QuantConfig(group_size=32), search, None, "group_size"),
        (GPTQ, search, None, "calibration"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_quantization(model, config, found)
            check_calibration(model, config, rows, found)
        assert caught.value.field == field
    with pytest.raises(ConfigError) as caught:
        QuantConfig(rounding="up")
    assert (caught.value.field, caught.value.value, caught.value.expected) == ("rounding", "up", "nearest or gptq")
    use_int4(model, round_blocks(model, search, NEAREST).weights)
    with pytest.raises(LayoutError) as caught:
        check_quantization(model, NEAREST)
    assert caught.value.expected == "a Linear"
