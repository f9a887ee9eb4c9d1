"""GGUF files read back by an independent reader: weights, metadata, refusals."""

import math

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from tests import tiny
from tests.export.gguf_fixtures import export
from tests.export.readers.gguf_file import F16, F32, Q4_0, Q4_1, Q8_0, read_gguf, rotary_rows
from tests.pages import numbers
from vila.core.errors import LayoutError
from vila.export import gguf_llm
from vila.export.base import write_export
from vila.export.gguf_llm import interleave_rotary_halves, llama3_rope_factors, llm_problems
from vila.export.gguf_tensors import encode
from vila.export.source import open_source
from vila.model.loading import save_model
from vila.quant.apply import apply_search
from vila.quant.awq_cache import AwqSearch, ChannelScale, WeightClip, save_search

BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def as_transformers(file, config):
    """The file's tensors by transformers' names, q and k in its order of rows."""
    out = {}
    outside = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, values in file.tensors.items():
        place, leaf = name.rsplit(".", 1)
        if place in outside:
            out[f"{outside[place]}.{leaf}"] = values
            continue
        _, index, kind = place.split(".")
        if kind in heads and file.metadata["general.architecture"] == "llama":
            values = rotary_rows(values, heads[kind])
        out[f"model.layers.{index}.{BLOCK[kind]}.{leaf}"] = values
    return out


def weights(model):
    state = {name: tensor.numpy() for name, tensor in model.language_model.state_dict().items()}
    if model.config.text_config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_is_in_the_file_as_float16(tmp_path, family, tied):
    model, processor = tiny.vila(family, tie_word_embeddings=tied)
    file = read_gguf(export(tmp_path, model, processor) / "model-f16.gguf")
    found, wanted = as_transformers(file, model.config.text_config), weights(model)
    assert found.keys() == wanted.keys()
    for name, values in found.items():
        exact = wanted[name] if wanted[name].ndim == 1 else wanted[name].astype(np.float16).astype(np.float32)
        assert np.array_equal(values, exact), name
    assert {file.types[name] for name, values in file.tensors.items() if values.ndim == 1} == {F32}
    assert {file.types[name] for name, values in file.tensors.items() if values.ndim == 2} == {F16}


@pytest.mark.parametrize("precision", ["q8_0", "q4_0", "q4_1"])
def test_blocks_are_within_half_a_step_of_the_weights(tmp_path, precision):
    model, processor = tiny.vila(tie_word_embeddings=False)
    file = read_gguf(export(tmp_path, model, processor, precision=precision) / f"model-{precision}.gguf")
    kind = {"q8_0": Q8_0, "q4_0": Q4_0, "q4_1": Q4_1}[precision]
    wanted = weights(model)
    for name, values in as_transformers(file, model.config.text_config).items():
        if values.ndim == 1:
            assert np.array_equal(values, wanted[name])
            continue
        used = Q8_0 if "layers" not in name else kind
        groups = wanted[name].reshape(-1, 32)
        largest = np.abs(groups).max(1)
        # Q4_0 has no ninth step on the side of its greatest magnitude's opposite: one whole step is lost there.
        bound = {Q8_0: largest / 127 / 2, Q4_0: largest / 8, Q4_1: (groups.max(1) - groups.min(1)) / 15 / 2}[used]
        # A float16 scale is off by 2^-11 of itself, which all codes of a block share.
        slack = largest * 2**-10
        error = np.abs(values.reshape(-1, 32) - groups).max(1)
        assert (error <= bound + slack).all(), name
        assert error.max() > 0
    assert file.types["token_embd.weight"] == file.types["output.weight"] == Q8_0
    assert file.types["blk.0.ffn_up.weight"] == kind
    assert file.metadata["general.file_type"] == {"q8_0": 7, "q4_0": 2, "q4_1": 3}[precision]


def test_rows_that_are_not_whole_blocks_are_float16(tmp_path):
    model, processor = tiny.vila(hidden_size=48, num_attention_heads=4, num_key_value_heads=2)
    file = read_gguf(export(tmp_path, model, processor, precision="q8_0") / "model-q8_0.gguf")
    assert file.types["blk.0.attn_q.weight"] == F16  # 48 inputs
    assert file.types["blk.0.ffn_down.weight"] == Q8_0  # 64 inputs


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_metadata_equal_the_config(tmp_path, family):
    rope = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
    model, processor = tiny.vila(family, rms_norm_eps=1e-5, rope_parameters=rope)
    facts = read_gguf(export(tmp_path, model, processor) / "model-f16.gguf").metadata
    arch = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}[family]
    assert facts["general.architecture"] == arch
    wanted = {
        "block_count": 2,
        "context_length": 512,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 8,
        "attention.value_length": 8,
        "rope.dimension_count": 8,
        "rope.freq_base": 5000.0,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 2.0,
        "vocab_size": len(tiny.tokenizer()),
    }
    assert {key: facts[f"{arch}.{key}"] for key in wanted} == wanted
    assert facts[f"{arch}.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


def test_the_context_length_of_mistral_is_its_sliding_window(tmp_path):
    model, processor = tiny.vila("mistral", sliding_window=128)
    out = export(tmp_path, model, processor)
    assert read_gguf(out / "model-f16.gguf").metadata["llama.context_length"] == 128
    assert 128 in numbers((out / "README.md").read_text())


def test_heads_are_interleaved_across_chunks(tmp_path, monkeypatch):
    """Heads of 96 rows, read 64 rows at a time."""
    monkeypatch.setattr(gguf_llm, "CHUNK_BYTES", 4)
    model, processor = tiny.vila(hidden_size=192, num_attention_heads=2, num_key_value_heads=1)
    file = read_gguf(export(tmp_path, model, processor) / "model-f16.gguf")
    wanted = weights(model)
    for name, values in as_transformers(file, model.config.text_config).items():
        if "q_proj" in name or "k_proj" in name:
            assert np.array_equal(values, wanted[name].astype(np.float16)), name


def test_rotary_halves_are_interleaved_in_each_head():
    rows = torch.arange(8)[:, None]
    assert interleave_rotary_halves(rows, 4).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleave_rotary_halves(rows.flatten(), 8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_a_search_is_folded_before_quantization(tmp_path):
    model, processor = tiny.vila()
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(32, generator=generator) + 0.5
    names = tuple(f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv")
    clip = WeightClip("model.layers.1.mlp.up_proj", torch.full((64, 1), 0.1))
    search = AwqSearch((ChannelScale("model.layers.0.input_layernorm", names, scale),), (clip,))
    save_search(search, tmp_path / "search.safetensors")
    out = export(tmp_path, model, processor, search=tmp_path / "search.safetensors")
    apply_search(model, search)
    found = as_transformers(read_gguf(out / "model-f16.gguf"), model.config.text_config)
    for name, values in weights(model).items():
        assert np.array_equal(found[name], values if values.ndim == 1 else values.astype(np.float16)), name
    assert np.abs(found["model.layers.1.mlp.up_proj.weight"]).max() == np.float16(0.1)


def test_llama3_rope_factors_equal_those_of_transformers(tmp_path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=128, num_attention_heads=1, max_position_embeddings=131072, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 500000 ** (torch.arange(0, 128, 2) / 128)
    factors = llama3_rope_factors(rope, 128)
    assert torch.allclose(plain / factors, scaled, rtol=1e-5)
    assert factors.min() == 1 and factors.max() == 8 and len(factors.unique()) > 3
    model, processor = tiny.vila(rope_parameters={**rope, "original_max_position_embeddings": 64})
    file = read_gguf(export(tmp_path, model, processor) / "model-f16.gguf")
    assert file.tensors["rope_freqs.weight"].shape == (4,)


def test_a_value_that_is_not_finite_in_float16_is_an_error_and_nothing_is_left(tmp_path):
    model, processor = tiny.vila()
    with torch.no_grad():
        model.language_model.model.layers[1].mlp.up_proj.weight[3, 4] = 1e6
    with pytest.raises(LayoutError) as caught:
        export(tmp_path, model, processor)
    assert caught.value.field == "blk.1.ffn_up.weight"
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "phi"}, "'phi'"),
        ({"use_sliding_window": True}, "sliding window"),
    ],
)
def test_unsupported_llms_have_a_reason(change, reason):
    config = tiny.text_config("qwen2")
    assert llm_problems(config) == []
    for key, value in change.items():
        object.__setattr__(config, key, value)
    (only,) = llm_problems(config)
    assert reason in only


def test_an_unsupported_tower_is_an_error_that_suggests_gguf_text(tmp_path):
    save_model(*tiny.vila(tower="dinov2"), tmp_path / "model")
    with pytest.raises(LayoutError) as caught:
        write_export(open_source(tmp_path / "model"), "gguf", tmp_path / "out")
    assert "dinov2" in caught.value.problem and "--format gguf-text" in caught.value.problem
    assert not (tmp_path / "out").exists()


def test_encoding_in_chunks_gives_the_same_bytes():
    values = torch.randn(128, 64, generator=torch.Generator().manual_seed(1))
    for kind in (Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1):
        whole = encode(values, kind, "w").tobytes()
        parts = b"".join(encode(part, kind, "w").tobytes() for part in values.split(48))
        assert whole == parts
        assert len(whole) == {Kind.F32: 4, Kind.F16: 2, Kind.Q8_0: 34 / 32, Kind.Q4_0: 18 / 32, Kind.Q4_1: 20 / 32}[
            kind
        ] * math.prod(values.shape)
