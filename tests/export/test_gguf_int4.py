"""INT4 models as GGUF keep their codes."""

import numpy as np
import pytest
import torch

from tests import tiny
from tests.export.gguf_fixtures import ask_llama
from tests.export.readers.gguf_file import F16, Q4_1, Q8_0, read_gguf, rotary_rows
from vila.core.errors import LayoutError
from vila.export.base import ExportOptions, write_export
from vila.export.gguf_tensors import q4_1_blocks
from vila.export.source import open_source
from vila.kernels.int4 import dequantize, quantize
from vila.model.int4_weights import dequantize_model, use_int4
from vila.model.loading import save_model
from vila.quant.apply import quantize_model

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def folder(tmp_path):
    """A tiny LLaVA in 4 bits, groups of 64, and its full-precision twin of the same values."""
    model, processor = tiny.vila(tower="clip", **SIZES)
    use_int4(model, quantize_model(model, None, 64))
    save_model(model, processor, tmp_path / "model", layout="awq-hf")
    dequantize_model(model, torch.float32)
    return tmp_path, model


def export(folder, precision):
    write_export(open_source(folder / "model"), "gguf-text", folder / precision, ExportOptions(precision))
    return folder / precision / f"model-{precision}.gguf"


@pytest.mark.parametrize(("precision", "tolerance"), [("f16", 2**-11), ("q4_1", 2**-9)])
def test_the_values_of_int4_weights_are_kept(folder, precision, tolerance):
    """In Q4_1 -zero * scale is a half: off by at most 2^-11 of itself, which is 15 steps at most."""
    where, model = folder
    file = read_gguf(export(where, precision))
    state = model.language_model.state_dict()
    for name, theirs in (("attn_q", "self_attn.q_proj"), ("attn_v", "self_attn.v_proj"), ("ffn_down", "mlp.down_proj")):
        found = file.tensors[f"blk.1.{name}.weight"]
        found = rotary_rows(found, 4) if name == "attn_q" else found
        wanted = state[f"model.layers.1.{theirs}.weight"].numpy()
        assert np.abs(found - wanted).max() <= tolerance * 2 * np.abs(wanted).max(), name
        assert file.types[f"blk.1.{name}.weight"] == {"f16": F16, "q4_1": Q4_1}[precision]
    assert file.types["token_embd.weight"] == {"f16": F16, "q4_1": Q8_0}[precision]


@pytest.mark.parametrize("precision", ["q8_0", "q4_0"])
def test_quantizing_a_second_time_is_an_error(folder, precision):
    with pytest.raises(LayoutError) as caught:
        export(folder[0], precision)
    assert "f16 or q4_1" in caught.value.problem


@pytest.mark.parametrize("group", [32, 64, 128])
def test_blocks_contain_the_codes(group):
    weight = quantize(torch.randn(3, 256, generator=torch.Generator().manual_seed(group)), group)
    blocks = q4_1_blocks(weight).numpy().reshape(3, 8, 20)
    codes = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=-1).reshape(3, 256)
    halves = blocks[..., :4].copy().view(np.float16).astype(np.float32)
    values = codes.reshape(3, 8, 32) * halves[..., :1] + halves[..., 1:]
    step = weight.scales.float().max().item()
    assert np.abs(values.reshape(3, 256) - dequantize(weight).numpy()).max() < 0.005 * step


@pytest.mark.slow
def test_llama_cpp_agrees_with_the_int4_model(folder):
    """A random model, 200 tokens, llama-cpp-python 0.3.36: F16 1.0, Q4_1 0.95 (it rounds activations to 8 bits)."""
    where, model = folder
    ids = torch.randint(3, 250, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        wanted = model.language_model(torch.tensor([ids])).logits[0].argmax(-1).numpy()
    for precision, least in (("f16", 0.99), ("q4_1", 0.9)):
        (found,) = ask_llama(model=export(where, precision), forced=[ids])["forced"]
        assert (wanted == np.array(found)).mean() > least, precision
