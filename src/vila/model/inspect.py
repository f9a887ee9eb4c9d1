"""What a checkpoint is, from its configs and the headers of its weight files alone."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vila.model.layouts.base import Checkpoint
    from vila.model.weights import TensorRef

ELEMENT_BYTES = {"bfloat16": 2, "float32": 4}
"""Number types that memory is told for, and the bytes of a number."""
MEMORY_NOTE = (
    "Weights are parameters x bytes of a number, but for those in 4 bits; the KV cache is 2 x layers x key-value "
    "heads x head width x bytes of a number for each token; what is computed on the way comes on top."
)
_PARTS = {"vision_tower": "vision tower", "projector": "projector", "language_model": "LLM"}
_TIED = "language_model.lm_head.weight"
_INT4 = "int4"


def inspect_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Layout, parts, picture and context facts and needed memory (bytes), as plain data for JSON."""
    from vila.core.vision_spec import VisionSpec
    from vila.model.layouts.detect import detect_layout

    config = checkpoint.config
    spec = VisionSpec.from_dict(config.vision_spec)
    weights = [_weight_facts(prefix, checkpoint) for prefix in _PARTS]
    int4 = _int4_facts(checkpoint)
    shapes = [tower_shape(config.vision_config), _projector_shape(config), llm_shape(config.text_config)]
    parameters = sum(part["parameters"] for part in weights)
    packed, unpacked = (int4["memory"], parameters - int4["parameters"]) if int4 else (0, parameters)
    per_token = kv_elements_per_token(config.text_config)
    return {
        "folder": str(checkpoint.folder),
        "layout": detect_layout(checkpoint.folder).name,
        "storage": _storage(checkpoint),
        "dtype": _main_dtype(checkpoint),
        "int4": int4,
        "parameters": parameters,
        "bytes": sum(part["bytes"] for part in weights),
        "parts": {name: {**part, **shape} for name, part, shape in zip(_PARTS.values(), weights, shapes, strict=True)},
        "template": config.template or None,
        "image_mode": spec.image_mode,
        "exif_orientation": spec.exif_orientation,
        "image_size": spec.image_size,
        "tokens_per_image": spec.tokens_per_image,
        "frames_per_video": spec.num_video_frames,
        "context_length": config.context_length,
        "memory": {
            kind: {
                "weights": unpacked * size + packed,
                "kv_cache_per_1000_tokens": 1000 * per_token * size,
                "kv_cache_full_context": config.context_length * per_token * size,
            }
            for kind, size in ELEMENT_BYTES.items()
        },
    }


def kv_elements_per_token(llm: Any) -> int:
    """Numbers that the KV cache holds for one token: a key and a value for each layer and key-value head."""
    heads = int(getattr(llm, "num_key_value_heads", None) or llm.num_attention_heads)
    width = int(getattr(llm, "head_dim", None) or llm.hidden_size // llm.num_attention_heads)
    return 2 * int(llm.num_hidden_layers) * heads * width


def tower_shape(tower: Any) -> dict[str, Any]:
    """Type, layers, width, heads, patch and picture size of a vision tower."""
    return {
        "type": tower.model_type,
        "layers": tower.num_hidden_layers,
        "width": tower.hidden_size,
        "heads": tower.num_attention_heads,
        "patch_size": _side(tower.patch_size),
        "image_size": _side(tower.image_size),
    }


def llm_shape(llm: Any) -> dict[str, Any]:
    """Type, layers, width, heads, key-value heads, MLP width and vocabulary of an LLM."""
    return {
        "type": llm.model_type,
        "layers": llm.num_hidden_layers,
        "width": llm.hidden_size,
        "heads": llm.num_attention_heads,
        "kv_heads": getattr(llm, "num_key_value_heads", None) or llm.num_attention_heads,
        "mlp_width": llm.intermediate_size,
        "vocabulary": llm.vocab_size,
    }


def _projector_shape(config: Any) -> dict[str, Any]:
    return {
        "type": config.projector_type,
        "width_in": config.vision_width,
        "width_out": config.text_config.hidden_size,
    }


def _weight_facts(prefix: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """Parameters, bytes and number types of the weights below `prefix`; a tied head is not counted twice."""
    skipped = {_TIED} if checkpoint.config.text_config.tie_word_embeddings else set()
    pieces = [
        piece for name, piece in checkpoint.tensors.items() if name.startswith(f"{prefix}.") and name not in skipped
    ]
    packed = [weight for name, weight in checkpoint.int4.items() if name.startswith(f"{prefix}.")]
    kinds = {_name(piece.dtype) for piece in pieces} | ({_INT4} if packed else set())
    return {
        "parameters": sum(prod(piece.shape) for piece in pieces) + sum(prod(weight.shape) for weight in packed),
        "bytes": sum(map(_bytes, pieces)) + sum(weight.bytes for weight in packed),
        "dtype": ", ".join(sorted(kinds)),
    }


def _int4_facts(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The weights in 4 bits: packing, group size, Linears, bytes in the files and in memory; None without any."""
    weights = list(checkpoint.int4.values())
    if not weights:
        return None
    parameters = sum(prod(weight.shape) for weight in weights)
    groups = sum(prod(weight.shape) // weight.group_size for weight in weights)
    return {
        "packing": weights[0].packing,
        "group_size": weights[0].group_size,
        "linears": len(weights),
        "parameters": parameters,
        "bytes": sum(weight.bytes for weight in weights),
        # A code is half a byte, the scale of a group two and its zero one.
        "memory": parameters // 2 + 3 * groups,
    }


def _bytes(piece: TensorRef) -> int:
    # Not what the file holds: a joined query, key and value is three weights of ours.
    return prod(piece.shape) * piece.dtype.itemsize


def _main_dtype(checkpoint: Checkpoint) -> str:
    sizes: Counter[str] = Counter()
    for piece in checkpoint.tensors.values():
        sizes[_name(piece.dtype)] += prod(piece.shape)
    sizes[_INT4] += sum(prod(weight.shape) for weight in checkpoint.int4.values())
    return sizes.most_common(1)[0][0]


def _storage(checkpoint: Checkpoint) -> dict[str, Any]:
    packed = [piece for weight in checkpoint.int4.values() for piece in weight.parts.values()]
    files = sorted({piece.file.path for piece in [*checkpoint.tensors.values(), *packed]})
    kinds = sorted({path.suffix.removeprefix(".") for path in files})
    return {"format": ", ".join(kinds), "files": len(files), "bytes": sum(path.stat().st_size for path in files)}


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _side(size: Any) -> int:
    return int(size[0] if isinstance(size, (list, tuple)) else size)
