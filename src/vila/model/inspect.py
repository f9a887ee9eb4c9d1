"""Describe a checkpoint from its configs and weight file headers, without reading weights."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import TYPE_CHECKING, Any

from vila.families import head_width, num_kv_heads

if TYPE_CHECKING:
    from pathlib import Path

    from vila.model.layouts.base import Checkpoint, CheckpointFiles

ELEMENT_BYTES = {"bfloat16": 2, "float32": 4}
"""Dtypes for which memory is estimated, with bytes per element."""
MEMORY_NOTE = (
    "Weights: parameters x bytes per element (INT4 weights as stored). KV cache per token: 2 x layers x key-value "
    "heads x head width x bytes per element. Activations come on top."
)
_MODULES = {"vision_tower": "vision tower", "projector": "projector", "language_model": "LLM"}
_TIED = "language_model.lm_head.weight"
_INT4 = "int4"


def inspect(
    path: str | Path, *, template: str | None = None, base: str | Path | None = None, revision: str | None = None
) -> dict[str, Any]:
    """Return the description of a checkpoint, see `inspect_checkpoint`; the arguments are those of `open_checkpoint`.

    Raises every error of a checkpoint that loading would raise. Torch and transformers are imported only for models
    that `is_loadable` cannot judge.
    """
    from vila.model.hub import local_folder
    from vila.model.layouts.detect import open_folder

    folder = local_folder(path, revision)
    files = open_folder(folder, None if base is None else local_folder(base))
    if not template and is_loadable(files):
        return inspect_checkpoint(files)
    from vila.model.loading import empty_model, open_checkpoint

    checkpoint = open_checkpoint(path, template=template, base=base, revision=revision)
    empty_model(checkpoint)
    return inspect_checkpoint(checkpoint)


def is_loadable(files: CheckpointFiles) -> bool:
    """Return whether a checkpoint certainly loads: its tokenizer is plain, and its weights are those of its config.

    False means that it is unknown here.
    """
    from vila.model.expected_weights import expected_weights
    from vila.model.layouts.tokenizer_files import is_plain_tokenizer

    expected = None if files.unexpected else expected_weights(files.settings)
    if expected is None:
        return False
    stored = {name: ref.shape for name, ref in files.tensors.items() if ref.dtype.is_floating_point}
    packed = {f"{name}.weight": weight.shape for name, weight in files.int4.items()}
    tied = _TIED in stored and _TIED not in expected
    if tied:
        del stored[_TIED]
    known = len(stored) + len(packed) + tied == len(files.tensors) + len(files.int4)
    if not known or stored.keys() & packed.keys() or {**stored, **packed} != expected:
        return False
    return is_plain_tokenizer(files.processor.folder, files.settings.image_token_id)


def inspect_checkpoint(checkpoint: Checkpoint | CheckpointFiles) -> dict[str, Any]:
    """Return layout, modules, image and context settings, and required memory (bytes) as JSON-ready data."""
    from vila.core.vision_spec import VisionSpec
    from vila.model.layouts.detect import detect_layout

    config: Any = _config(checkpoint)
    spec = VisionSpec.from_dict(config.vision_spec)
    weights = [_weight_summary(prefix, checkpoint) for prefix in _MODULES]
    int4 = _int4_summary(checkpoint)
    projector = {
        "type": config.projector_type, "width_in": config.vision_width, "width_out": config.text_config.hidden_size
    }  # fmt: skip
    shapes = [tower_shape(config.vision_config), projector, llm_shape(config.text_config)]
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
        "parts": {
            name: {**part, **shape} for name, part, shape in zip(_MODULES.values(), weights, shapes, strict=True)
        },
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


def _config(checkpoint: Checkpoint | CheckpointFiles) -> Any:
    return checkpoint.settings if hasattr(checkpoint, "settings") else checkpoint.config


def kv_elements_per_token(llm: Any) -> int:
    """Return the elements of the KV cache per token: a key and a value for each layer and key-value head."""
    return 2 * int(llm.num_hidden_layers) * num_kv_heads(llm) * head_width(llm)


def tower_shape(tower: Any) -> dict[str, Any]:
    """Return type, layers, width, heads, patch and image size of a vision tower."""
    return {
        "type": tower.model_type,
        "layers": tower.num_hidden_layers,
        "width": tower.hidden_size,
        "heads": tower.num_attention_heads,
        "patch_size": _side(tower.patch_size),
        "image_size": _side(tower.image_size),
    }


def llm_shape(llm: Any) -> dict[str, Any]:
    """Return type, layers, width, heads, key-value heads, MLP width and vocabulary of an LLM."""
    return {
        "type": llm.model_type,
        "layers": llm.num_hidden_layers,
        "width": llm.hidden_size,
        "heads": llm.num_attention_heads,
        "kv_heads": num_kv_heads(llm),
        "mlp_width": llm.intermediate_size,
        "vocabulary": llm.vocab_size,
    }


def _weight_summary(prefix: str, checkpoint: Checkpoint | CheckpointFiles) -> dict[str, Any]:
    """Return parameters, bytes and dtypes of the weights below `prefix`; a tied LM head is counted once."""
    skipped = {_TIED} if _config(checkpoint).text_config.tie_word_embeddings else set()
    refs = [ref for name, ref in checkpoint.tensors.items() if name.startswith(f"{prefix}.") and name not in skipped]
    packed = [weight for name, weight in checkpoint.int4.items() if name.startswith(f"{prefix}.")]
    kinds = {_name(ref.dtype) for ref in refs} | ({_INT4} if packed else set())
    # Unlike `TensorRef.bytes`, which counts a fused query, key and value three times.
    plain_bytes = sum(prod(ref.shape) * ref.dtype.itemsize for ref in refs)
    return {
        "parameters": sum(prod(ref.shape) for ref in refs) + sum(prod(weight.shape) for weight in packed),
        "bytes": plain_bytes + sum(weight.bytes for weight in packed),
        "dtype": ", ".join(sorted(kinds)),
    }


def _int4_summary(checkpoint: Checkpoint | CheckpointFiles) -> dict[str, Any] | None:
    """Return packing, group size, Linears, and bytes in files and memory of INT4 weights; None if there are none."""
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
        # Half a byte per code; two bytes per scale and one per zero of each group.
        "memory": parameters // 2 + 3 * groups,
    }


def _main_dtype(checkpoint: Checkpoint | CheckpointFiles) -> str:
    sizes: Counter[str] = Counter()
    for ref in checkpoint.tensors.values():
        sizes[_name(ref.dtype)] += prod(ref.shape)
    sizes[_INT4] += sum(prod(weight.shape) for weight in checkpoint.int4.values())
    return sizes.most_common(1)[0][0]


def _storage(checkpoint: Checkpoint | CheckpointFiles) -> dict[str, Any]:
    packed = [ref for weight in checkpoint.int4.values() for ref in weight.parts.values()]
    files = sorted({ref.file.path for ref in [*checkpoint.tensors.values(), *packed]})
    kinds = sorted({path.suffix.removeprefix(".") for path in files})
    return {"format": ", ".join(kinds), "files": len(files), "bytes": sum(path.stat().st_size for path in files)}


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _side(size: Any) -> int:
    return int(size[0] if isinstance(size, (list, tuple)) else size)
