"""Tiny random checkpoints in the published layouts, written by hand to what is known of them; no `vila` in here.

Each function of `FIXTURES` writes one directory and says how it is to be loaded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

TOKENIZER = Path(__file__).parents[2] / "golden" / "tokenizers" / "vicuna_v15_legacy_false" / "tokenizer.model"
VOCABULARY, WIDTH = 1200, 64
LLM = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 14}


@dataclass(frozen=True)
class Written:
    """A checkpoint on disk; `base` is the directory of its LLM where it needs one."""

    folder: Path
    base: Path | None = None


def llm_weights(seed: int = 0) -> dict[str, Tensor]:
    """A LLaMA with its published names."""
    torch.manual_seed(seed)
    return dict(LlamaForCausalLM(LlamaConfig(**LLM)).state_dict())


def tower_weights(kind: str, image_size: int) -> dict[str, Tensor]:
    """A CLIP or SigLIP tower with its published names, `vision_model.*`."""
    torch.manual_seed(1)
    if kind == "clip":
        model = CLIPVisionModel(CLIPVisionConfig(**TOWER, image_size=image_size, initializer_factor=5.0))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**TOWER, image_size=image_size))
    noise = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    return {"vision_model." + name.removeprefix("vision_model."): tensor for name, tensor in noise.items()}


def intern_vit_weights(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """InternViT-6B by the names of its own code: fused qkv, layer scales, norms of queries and keys."""
    torch.manual_seed(2)
    width, inner = config["hidden_size"], config["intermediate_size"]
    patches = (config["image_size"] // config["patch_size"]) ** 2

    def draw(*shape: int, around: float = 0.0) -> Tensor:
        return around + 0.2 * torch.randn(*shape)

    out = {
        "embeddings.class_embedding": draw(1, 1, width),
        "embeddings.position_embedding": draw(1, patches + 1, width),
        "embeddings.patch_embedding.weight": draw(width, 3, config["patch_size"], config["patch_size"]) * 0.2,
        "embeddings.patch_embedding.bias": draw(width),
    }
    for number in range(config["num_hidden_layers"]):
        block = f"encoder.layers.{number}."
        out |= {
            block + "ls1": draw(width, around=0.5),
            block + "ls2": draw(width, around=0.5),
            block + "norm1.weight": draw(width, around=1.0),
            block + "norm2.weight": draw(width, around=1.0),
            block + "attn.qkv.weight": draw(3 * width, width),
            block + "attn.proj.weight": draw(width, width),
            block + "attn.proj.bias": draw(width),
            block + "attn.q_norm.weight": draw(width, around=1.0),
            block + "attn.k_norm.weight": draw(width, around=1.0),
            block + "mlp.fc1.weight": draw(inner, width),
            block + "mlp.fc1.bias": draw(inner),
            block + "mlp.fc2.weight": draw(width, inner),
            block + "mlp.fc2.bias": draw(width),
        }
    return out


def projector_weights(kind: str, width_in: int) -> dict[str, Tensor]:
    """A projector by the names inside its Sequential; `linear` has no numbers."""
    torch.manual_seed(3)

    def linear(name: str, rows: int, columns: int) -> dict[str, Tensor]:
        return {f"{name}weight": 0.3 * torch.randn(rows, columns), f"{name}bias": 0.3 * torch.randn(rows)}

    if kind == "identity":
        return {}
    if kind == "linear":
        return linear("", WIDTH, width_in)
    if kind == "mlp_downsample":
        norm = {"1.weight": 1 + 0.2 * torch.randn(4 * width_in), "1.bias": 0.2 * torch.randn(4 * width_in)}
        return norm | linear("2.", WIDTH, 4 * width_in) | linear("4.", WIDTH, WIDTH)
    out = linear("0.", WIDTH, width_in)
    for number in range(1, int(kind[3])):
        out |= linear(f"{2 * number}.", WIDTH, WIDTH)
    return out


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(value, indent=1))


def write_weights(folder: Path, tensors: Mapping[str, Tensor], form: str, dtype: torch.dtype = torch.float32) -> None:
    """Write weights as safetensors or bin, in one file or in three shards with an index."""
    tensors = {name: tensor.to(dtype).contiguous().clone() for name, tensor in tensors.items()}
    suffix = "safetensors" if form.endswith("safetensors") else "bin"
    stem = "model" if suffix == "safetensors" else "pytorch_model"

    def save(part: dict[str, Tensor], path: Path) -> None:
        if suffix == "bin":
            torch.save(part, path)
        else:
            save_file(part, path, metadata={"format": "pt"})

    if not form.startswith("sharded"):
        save(tensors, folder / f"{stem}.{suffix}")
        return
    names = sorted(tensors)
    index = {}
    for number in range(3):
        file = f"{stem}-{number + 1:05d}-of-00003.{suffix}"
        part = {name: tensors[name] for name in names[number::3]}
        save(part, folder / file)
        index.update(dict.fromkeys(part, file))
    write_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": index})


def write_tower(folder: Path, kind: str, image_size: int, form: str = "safetensors") -> dict[str, Any]:
    """A CLIP, SigLIP or InternViT directory; returns its config."""
    folder.mkdir(parents=True)
    if kind == "intern":
        config = {
            **TOWER,
            "model_type": "intern_vit_6b",
            "architectures": ["InternVisionModel"],
            "image_size": image_size,
            "norm_type": "rms_norm",
            "qk_normalization": True,
            "qkv_bias": False,
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu",
        }
        write_weights(folder, intern_vit_weights(config), form)
    else:
        config = {
            **TOWER,
            "model_type": f"{kind}_vision_model",
            "architectures": [{"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}[kind]],
            "image_size": image_size,
        }
        write_weights(folder, tower_weights(kind, image_size), form)
    write_json(folder / "config.json", config)
    statistics = {
        "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
        "siglip": ([0.5] * 3, [0.5] * 3),
        "intern": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    }[kind]
    write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": image_size,
            "do_center_crop": kind != "siglip",
            "image_mean": statistics[0],
            "image_std": statistics[1],
            "resample": 3,
            "size": image_size if kind != "siglip" else {"height": image_size, "width": image_size},
        },
    )
    return config


def llava_config(tower: str, projector: str, **changes: Any) -> dict[str, Any]:
    """config.json of LLaVA-1.5 and VILA-1.0."""
    return {
        **LLM,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_vision_tower": tower,
        "mm_projector_type": projector,
        "mm_hidden_size": TOWER["hidden_size"],
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "rope_theta": 10000.0,
        "rope_scaling": None,
        **changes,
    }


def llava_v1(
    root: Path,
    projector: str = "mlp2x_gelu",
    form: str = "safetensors",
    dtype: torch.dtype = torch.float32,
    inside: bool = False,
    old_buffers: bool = False,
    **changes: Any,
) -> Written:
    """A complete LLaVA-1.5 directory, with its CLIP tower next to it or among its weights."""
    folder, tower = root / "checkpoint", root / "tower"
    folder.mkdir(parents=True)
    write_tower(tower, "clip", 56, "bin")
    weights = {**llm_weights()}
    weights |= {f"model.mm_projector.{name}": t for name, t in projector_weights(projector, 32).items()}
    if inside:
        weights |= {f"model.vision_tower.vision_tower.{n}": t + 0.05 for n, t in tower_weights("clip", 56).items()}
    if old_buffers:
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    write_weights(folder, weights, form, dtype)
    write_json(folder / "config.json", llava_config("tower", projector, **changes))
    shutil.copyfile(TOKENIZER, folder / "tokenizer.model")
    return Written(folder)


def base_llm(root: Path) -> Path:
    """The LLM alone, as its publisher writes it."""
    folder = root / "base"
    folder.mkdir(parents=True)
    write_weights(folder, llm_weights(), "sharded-bin")
    write_json(folder / "config.json", {**LLM, "architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    shutil.copyfile(TOKENIZER, folder / "tokenizer.model")
    return folder


def stage_1(root: Path) -> Written:
    """Output of stage 1: config.json and mm_projector.bin; the LLM is in another directory."""
    folder = root / "checkpoint"
    folder.mkdir(parents=True)
    write_tower(root / "tower", "clip", 56)
    projector = {f"model.mm_projector.{name}": t for name, t in projector_weights("mlp2x_gelu", 32).items()}
    torch.save(projector, folder / "mm_projector.bin")
    write_json(folder / "config.json", llava_config("tower", "mlp2x_gelu"))
    return Written(folder, base_llm(root))


def lora(root: Path) -> Written:
    """A LoRA directory: adapter and other trained weights; the LLM is in another directory."""
    folder = root / "checkpoint"
    folder.mkdir(parents=True)
    write_tower(root / "tower", "clip", 56)
    write_json(folder / "config.json", llava_config("tower", "mlp2x_gelu"))
    write_json(
        folder / "adapter_config.json",
        {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj", "down_proj"]},
    )
    torch.manual_seed(4)
    adapter = {}
    for layer in range(2):
        for name, rows, columns in (("self_attn.q_proj", 64, 64), ("mlp.down_proj", 64, 96)):
            stem = f"base_model.model.model.layers.{layer}.{name}"
            adapter[f"{stem}.lora_A.weight"] = 0.2 * torch.randn(4, columns)
            adapter[f"{stem}.lora_B.weight"] = 0.2 * torch.randn(rows, 4)
    torch.save(adapter, folder / "adapter_model.bin")
    other = {f"base_model.model.model.mm_projector.{n}": t for n, t in projector_weights("mlp2x_gelu", 32).items()}
    torch.save(other, folder / "non_lora_trainables.bin")
    return Written(folder, base_llm(root))


def vila_v15(
    root: Path,
    tower: str = "siglip",
    image_size: int = 70,
    projector: str = "mlp_downsample",
    s2: tuple[int, ...] = (),
    form: str = "safetensors",
    dtype: torch.dtype = torch.float32,
) -> Written:
    """The three directories of VILA-1.5."""
    folder = root / "checkpoint"
    folder.mkdir(parents=True)
    tower_config = write_tower(folder / "vision_tower", tower, image_size, form)
    llm = folder / "llm"
    llm.mkdir()
    write_weights(llm, llm_weights(), form, dtype)
    llm_config = {**LLM, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_scaling": None}
    write_json(llm / "config.json", llm_config)
    shutil.copyfile(TOKENIZER, llm / "tokenizer.model")
    write_json(llm / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": False})
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    write_json(llm / "special_tokens_map.json", special)
    width = 32 * max(1, len(s2))
    part = folder / "mm_projector"
    part.mkdir()
    config = {"mm_projector_type": projector, "model_type": "v2l_projector", "architectures": ["MultimodalProjector"]}
    write_json(part / "config.json", config)
    write_weights(part, {f"layers.{name}": t for name, t in projector_weights(projector, width).items()}, form, dtype)
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlavaLlamaModel"],
            "model_type": "llava_llama",
            "image_aspect_ratio": "resize",
            "llm_cfg": llm_config,
            "vision_tower_cfg": tower_config,
            "mm_projector_cfg": config,
            "mm_hidden_size": width,
            "mm_vision_select_feature": "cls_patch" if tower == "siglip" else "patch",
            "mm_vision_select_layer": -1 if tower == "intern" else -2,
            "num_video_frames": 8,
            "resume_path": str(folder),
            "s2": bool(s2),
            "s2_scales": ",".join(map(str, s2)) or "336,672,1008",
            "s2_max_split_size": s2[0] if s2 else 336,
            "vision_resolution": -1,
        },
    )
    return Written(folder)


FIXTURES: dict[str, Callable[[Path], Written]] = {
    "v1-linear": lambda root: llava_v1(root, "linear"),
    "v1-mlp2x": lambda root: llava_v1(root, "mlp2x_gelu"),
    "v1-mlp3x": lambda root: llava_v1(root, "mlp3x_gelu"),
    "v1-bin": lambda root: llava_v1(root, form="bin"),
    "v1-sharded-safetensors": lambda root: llava_v1(root, form="sharded-safetensors"),
    "v1-sharded-bin": lambda root: llava_v1(root, form="sharded-bin"),
    "v1-float16": lambda root: llava_v1(root, dtype=torch.float16),
    "v1-bfloat16": lambda root: llava_v1(root, form="bin", dtype=torch.bfloat16),
    "v1-tower-inside": lambda root: llava_v1(root, inside=True),
    "v1-old-buffers": lambda root: llava_v1(root, form="bin", old_buffers=True),
    "v1-square": lambda root: llava_v1(root, image_aspect_ratio="square"),
    "v1-stage-1": stage_1,
    "v1-lora": lora,
    "v15-odd-grid": lambda root: vila_v15(root, image_size=70),
    "v15-even-grid": lambda root: vila_v15(root, image_size=56),
    "v15-sharded-bin": lambda root: vila_v15(root, form="sharded-bin"),
    "v15-bfloat16": lambda root: vila_v15(root, dtype=torch.bfloat16),
    "v15-clip": lambda root: vila_v15(root, tower="clip", image_size=56),
    "v15-intern-vit": lambda root: vila_v15(root, tower="intern", image_size=56),
    "v15-s2": lambda root: vila_v15(root, image_size=28, s2=(28, 56)),
    "v15-linear": lambda root: vila_v15(root, projector="linear"),
    "v15-mlp2x": lambda root: vila_v15(root, projector="mlp2x_gelu"),
}
"""Every supported published checkpoint; docs/checkpoints.md lists these names."""
