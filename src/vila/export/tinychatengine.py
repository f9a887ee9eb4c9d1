"""TinyChatEngine's directory: raw little-endian arrays without headers, laid out to be copied over its `llm`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila.export.target import ExportOptions, Guide

if TYPE_CHECKING:
    from vila.export.source import Source
    from vila.model.config import VilaConfig

NAME = "VILA_7B"
"""The name by which the engine knows the one model whose sizes it has compiled in."""
_LLM = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
_TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_BLOCKS, _EPSILON = 23, 1e-5


@dataclass(frozen=True)
class TinyChatEngineTarget:
    """The LLM in float32 or in one of the INT4 orders, the tower and projector in float32, the vocabulary."""

    name: str = "tinychatengine"
    summary: str = "Raw arrays for TinyChatEngine on x86, Arm and CUDA"
    precisions: Mapping[str, str] = field(
        default_factory=lambda: {
            "qm_x86": "INT4 with a scale for 32 weights, in the order of x86",
            "qm_arm": "INT4 with a scale for 32 weights, in the order of Arm",
            "qm_cuda": "INT4 with a scale for 128 weights, in the order of CUDA",
            "fp32": "float32 throughout",
        }
    )
    takes: frozenset[str] = frozenset({"search"})
    holds_llm: bool = True
    verified: str = "read back by an independent reader, bit by bit; the engine itself was not run"

    def refusals(self, source: Source, options: ExportOptions) -> list[str]:
        """What the engine has not compiled in."""
        from vila.export.full_precision import int4_source_refusals

        reasons = [*llm_refusals(source.config.text_config), *int4_source_refusals(source)]
        reasons += vision_refusals(source.config)
        if not source.processor.span_tokenizer.dummy_prefix:
            reasons.append("its tokenizer is no SentencePiece of LLaMA, the only one that the engine has")
        return reasons

    def write(self, source: Source, part: Path, options: ExportOptions) -> None:
        """Write models/ and, in INT4, INT4/models/."""
        from vila.export import tinychatengine_files as files

        root = part if options.precision == "fp32" else part / "INT4"
        files.write_llm(source, root / "models" / NAME, options.precision)
        files.write_vision(source, part / "models" / "CLIP_ViT_Large", _BLOCKS)
        files.write_vocabulary(source, part / "models" / "llama_vocab.bin")

    def guide(self, source: Source, options: ExportOptions) -> Guide:
        """How to run it in the engine."""
        kind = "FP32" if options.precision == "fp32" else "INT4"
        commands = [
            ("Put it in place", "cp -r {out}/. TinyChatEngine/llm/"),
            ("Build and ask", f"cd TinyChatEngine/llm\nmake chat -j\n./chat {NAME} {kind} 4 photo.png"),
        ]
        defects = [
            "The engine writes its own prompt, which opens with `This is a chat between a user and an assistant.`, "
            "and takes 0.2 as its temperature: not what the model was trained and evaluated with.",
            "It normalises all three colours of a picture with the mean and deviation of red.",
        ]
        notes = [
            "Its INT4 is a symmetric rounding of its own; of AWQ it takes what a search folds into the weights: "
            "`--search`.",
            "Sizes are compiled in: 32 blocks of 4096, and CLIP-L/336 with the two-layer projector.",
        ]
        if options.precision == "qm_cuda":
            notes.append("No VILA for CUDA was ever published for it; these files follow its own converter.")
        return Guide(commands, ["TinyChatEngine of 2024: not run"], defects, notes)


def llm_refusals(config: Any) -> list[str]:
    """Why the engine could not run this LLM."""
    if config.model_type != "llama":
        return [f"an LLM of type {config.model_type!r} is not compiled in; VILA-7B's llama is"]
    reasons = _differing("the LLM's", config, _LLM)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        reasons.append(f"rope_type {rope['rope_type']!r} has no place in its files; 'default' has")
    if config.rms_norm_eps != _EPSILON:
        reasons.append(f"rms_norm_eps {config.rms_norm_eps:g} is compiled in as {_EPSILON:g}")
    return reasons


def vision_refusals(config: VilaConfig) -> list[str]:
    """Why the engine could not run this tower and projector."""
    tower = config.vision_config
    reasons = []
    if tower.model_type != "clip_vision_model":
        reasons.append(f"a {tower.model_type} tower is not compiled in; CLIP-L/336 is")
    else:
        reasons += _differing("the tower's", tower, _TOWER)
        layer = config.select_layer % (tower.num_hidden_layers + 1)
        if layer != _BLOCKS or config.select_feature != "patch":
            reasons.append(f"it runs {_BLOCKS} blocks and drops the class token: select_layer -2 of 24, 'patch'")
    if config.s2_scales:
        reasons.append("S2 features are not compiled in; a model without s2_scales can be written")
    if config.projector_type != "mlp2x_gelu":
        reasons.append(
            f"the projector {config.projector_type!r} is not compiled in: it always runs two Linears with a GELU "
            "between them; 'mlp2x_gelu' can be written"
        )
    elif config.text_config.hidden_size != _LLM["hidden_size"]:
        reasons.append(
            f"a projector to {config.text_config.hidden_size} channels is not compiled in, 13B's 5120 included: its "
            f"width is {_LLM['hidden_size']}"
        )
    return reasons


def _differing(whose: str, config: Any, wanted: Mapping[str, int]) -> list[str]:
    found = {key: getattr(config, key) for key in wanted}
    return [
        f"{whose} {key} {found[key]} is compiled in as {wanted[key]}" for key in wanted if found[key] != wanted[key]
    ]


TARGET = TinyChatEngineTarget()
