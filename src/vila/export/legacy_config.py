"""config.json of a `trtllm-build` checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vila import __version__
from vila.core.files import write_json
from vila.export.source import Source


def write_config(source: Source, part: Path, architecture: str, group_size: int | None, ranks: int) -> None:
    """Write it. group_size: of INT4 weights, None for float16."""
    write_json(part / "config.json", checkpoint_config(source, architecture, group_size, ranks), indent=2)


def checkpoint_config(source: Source, architecture: str, group_size: int | None, ranks: int) -> dict[str, Any]:
    """What the builder has to know of the LLM."""
    llm = source.config.text_config
    rope = getattr(llm, "rope_parameters", None) or {}
    scaled = rope.get("rope_type", "default") == "linear"
    return {
        "producer": {"name": "vila", "version": __version__},
        "architecture": architecture,
        "dtype": "float16",
        "logits_dtype": "float32",
        "num_hidden_layers": llm.num_hidden_layers,
        "num_attention_heads": llm.num_attention_heads,
        "num_key_value_heads": llm.num_key_value_heads,
        "hidden_size": llm.hidden_size,
        "head_size": head_size(source),
        "intermediate_size": llm.intermediate_size,
        "norm_epsilon": llm.rms_norm_eps,
        "vocab_size": llm.vocab_size,
        "max_position_embeddings": llm.max_position_embeddings,
        "hidden_act": llm.hidden_act,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": float(rope.get("rope_theta", 10000.0)),
        "rotary_scaling": {"type": "linear", "factor": float(rope["factor"])} if scaled else None,
        # A tied head is written a second time, so that ranks may cut it.
        "share_embedding_table": False,
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": ranks, "tp_size": ranks, "pp_size": 1},
        "quantization": _quantization(group_size),
    }


def head_size(source: Source) -> int:
    """Channels of an attention head."""
    llm = source.config.text_config
    return int(getattr(llm, "head_dim", None) or llm.hidden_size // llm.num_attention_heads)


def _quantization(group_size: int | None) -> dict[str, Any]:
    if group_size is None:
        return {"quant_algo": None, "kv_cache_quant_algo": None}
    return {
        "quant_algo": "W4A16_AWQ",
        "kv_cache_quant_algo": None,
        "group_size": group_size,
        "has_zero_point": False,
        "pre_quant_scale": True,
        "exclude_modules": ["lm_head"],
    }
