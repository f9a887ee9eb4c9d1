"""A reader of INT4 as NVIDIA's ModelOpt writes it, in a Hugging Face directory and in TensorRT-LLM's own; numpy alone.

Symmetric. Byte [r, k] of `weight` [N/2, K] holds the two's complement codes of outputs 2r (low) and 2r + 1; a scale
[N, K/g] for every g inputs. The activation is multiplied by a pre-quantization scale [K] before the product.
"""

import json
from pathlib import Path

import numpy as np

from tests.export.readers.safetensors_file import read_file, read_folder

UNFUSED = ("o_proj", "down_proj")


def dequantized(packed: np.ndarray, scale: np.ndarray, group: int) -> np.ndarray:
    """Bytes [N/2, K] and scales [N, K/g] to weights [N, K]."""
    octets = packed.view(np.uint8).astype(np.int64)
    codes = np.empty((2 * octets.shape[0], octets.shape[1]), np.int64)
    codes[0::2], codes[1::2] = octets & 15, octets >> 4
    codes[codes > 7] -= 16
    assert scale.shape == (codes.shape[0], codes.shape[1] // group)
    return codes * np.repeat(scale.astype(np.float32), group, 1)


def read_hub_folder(folder: Path) -> dict[str, np.ndarray]:
    """Weights by the file's names, the activation's scale multiplied into the columns."""
    facts = json.loads((folder / "hf_quant_config.json").read_text())
    assert facts["producer"]["name"] == "modelopt"
    quantization = facts["quantization"]
    assert quantization["quant_algo"] == "W4A16_AWQ"
    assert quantization["kv_cache_quant_algo"] is None
    assert quantization["has_zero_point"] is False
    assert quantization["pre_quant_scale"] is True
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "modelopt"
    assert config["quant_algo"] == "W4A16_AWQ"
    assert config["ignore"] == quantization["exclude_modules"]
    held = read_folder(folder)
    out = {}
    for name, tensor in held.items():
        stem, _, leaf = name.rpartition(".")
        if leaf in ("weight_scale", "pre_quant_scale"):
            continue
        if f"{stem}.weight_scale" not in held or leaf != "weight":
            out[name] = tensor.astype(np.float32)
            continue
        assert tensor.dtype == np.uint8
        weight = dequantized(tensor, held[f"{stem}.weight_scale"], quantization["group_size"])
        # The loader asks for it on every Linear that it does not fuse with others.
        assert (f"{stem}.pre_quant_scale" in held) == stem.endswith(UNFUSED)
        if stem.endswith(UNFUSED):
            assert held[f"{stem}.pre_quant_scale"].shape == (weight.shape[1],)
            weight = weight * held[f"{stem}.pre_quant_scale"].astype(np.float32)
        out[name] = weight
    return out


def read_ranks(folder: Path) -> dict[str, np.ndarray]:
    """A `trtllm-build` checkpoint, all ranks joined, by names of a Hugging Face LLM.

    Ranks hold neighbouring heads of query, key and value one below the other, neighbouring rows of fc (the gate) and
    gate (up), neighbouring columns of dense and proj, and neighbouring rows of embeddings and head.
    """
    config = json.loads((folder / "config.json").read_text())
    ranks = config["mapping"]["world_size"]
    assert config["mapping"] == {"world_size": ranks, "tp_size": ranks, "pp_size": 1}
    assert (config["use_parallel_embedding"], config["embedding_sharding_dim"]) == (True, 0)
    files = [read_file(folder / f"rank{rank}.safetensors") for rank in range(ranks)]
    assert all(held.keys() == files[0].keys() for held in files)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [f"rank{r}.safetensors" for r in range(ranks)]
    join = _Join(config, files)
    vocabulary = config["vocab_size"]
    out = {
        "model.embed_tokens.weight": join.plain("transformer.vocab_embedding.weight", 0)[:vocabulary],
        "model.norm.weight": join.same("transformer.ln_f.weight"),
        "lm_head.weight": join.plain("lm_head.weight", 0)[:vocabulary],
    }
    for index in range(config["num_hidden_layers"]):
        theirs, ours = f"transformer.layers.{index}", f"model.layers.{index}"
        out[f"{ours}.input_layernorm.weight"] = join.same(f"{theirs}.input_layernorm.weight")
        out[f"{ours}.post_attention_layernorm.weight"] = join.same(f"{theirs}.post_layernorm.weight")
        for part, weight in join.attention(f"{theirs}.attention.qkv").items():
            out[f"{ours}.self_attn.{part}"] = weight
        for name, part, axis in (
            ("attention.dense", "self_attn.o_proj", 1),
            ("mlp.fc", "mlp.gate_proj", 0),
            ("mlp.gate", "mlp.up_proj", 0),
            ("mlp.proj", "mlp.down_proj", 1),
        ):
            out[f"{ours}.{part}.weight"] = join.linear(f"{theirs}.{name}", axis)
    assert not join.left, f"nobody read {sorted(join.left)[:5]}"
    return out


class _Join:
    def __init__(self, config: dict, files: list[dict[str, np.ndarray]]) -> None:
        self.config, self.files = config, files
        self.quantized = config["quantization"]["quant_algo"] == "W4A16_AWQ"
        self.left = set(files[0])

    def same(self, name: str) -> np.ndarray:
        parts = self._take(name)
        assert all(np.array_equal(part, parts[0]) for part in parts)
        return parts[0].astype(np.float32)

    def plain(self, name: str, axis: int) -> np.ndarray:
        return np.concatenate(self._take(name), axis).astype(np.float32)

    def linear(self, name: str, axis: int) -> np.ndarray:
        return np.concatenate(self._each(name, full_inputs=axis == 0), axis)

    def attention(self, name: str) -> dict[str, np.ndarray]:
        heads, pairs = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        size, ranks = self.config["head_size"], len(self.files)
        cuts = np.cumsum([heads * size // ranks, pairs * size // ranks])
        weights = [np.split(weight, cuts) for weight in self._each(name, full_inputs=True)]
        parts = ("q_proj", "k_proj", "v_proj")
        out = {f"{part}.weight": np.concatenate([rank[n] for rank in weights]) for n, part in enumerate(parts)}
        if f"{name}.bias" in self.left:
            biases = [np.split(bias.astype(np.float32), cuts) for bias in self._take(f"{name}.bias")]
            out |= {f"{part}.bias": np.concatenate([rank[n] for rank in biases]) for n, part in enumerate(parts)}
        return out

    def _each(self, name: str, *, full_inputs: bool) -> list[np.ndarray]:
        weights = self._take(f"{name}.weight")
        if not self.quantized:
            return [weight.astype(np.float32) for weight in weights]
        group = self.config["quantization"]["group_size"]
        assert all(weight.dtype == np.int8 for weight in weights)
        scales = self._take(f"{name}.weights_scaling_factor")
        before = self._take(f"{name}.prequant_scaling_factor")
        assert not full_inputs or all(np.array_equal(one, before[0]) for one in before)
        return [
            dequantized(weight, scale, group) * one.astype(np.float32)
            for weight, scale, one in zip(weights, scales, before, strict=True)
        ]

    def _take(self, name: str) -> list[np.ndarray]:
        self.left.discard(name)
        return [held[name] for held in self.files]
