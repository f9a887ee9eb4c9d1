"""Tiny models on disk, and searches for them: what exports are made of."""

from __future__ import annotations

from pathlib import Path

import torch

from tests import tiny
from vila.kernels.int4 import quantize
from vila.model.loading import save_model
from vila.quant.awq_cache import AwqSearch, ChannelScale, WeightClip, save_search
from vila.quant.blocks import block_name, can_scale, decoder_blocks, family_of

SMALL = {"hidden_size": 64, "intermediate_size": 128}
WIDE = {"hidden_size": 256, "intermediate_size": 512}


def write_model(folder: Path, family="llama", *, dtype=torch.float32, tower="clip", **text):
    """A tiny model in the native layout, with loud channels and norms and biases that matter; and its processor."""
    model, processor = tiny.vila(family, tower=tower, **{**SMALL, **text})
    if tower == "dinov2":
        # Stock LLaVA normalises the last hidden state of this tower, so layouts refuse it.
        model.config.select_layer = -2
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, ::7] *= 6
        for name, parameter in model.language_model.named_parameters():
            if "norm" in name:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model = model.to(dtype)
    model.config.dtype = dtype
    save_model(model, processor, folder)
    return model, processor


def random_search(model, group_size=32, **facts) -> AwqSearch:
    """Scales for every group that can be folded, and limits for every Linear but queries and keys."""
    generator = torch.Generator().manual_seed(2)
    scales, clips = [], []
    for index, block in enumerate(decoder_blocks(model)):
        for group in family_of(model).scale_groups:
            width = block.get_submodule(group.linears[0]).in_features
            if can_scale(group, block):
                scale = torch.rand(width, generator=generator) * 1.5 + 0.5
                names = tuple(f"{block_name(index)}.{name}" for name in group.linears)
                scales.append(ChannelScale(f"{block_name(index)}.{group.fold}", names, scale))
            for name in group.linears:
                if "q_proj" not in name and "k_proj" not in name:
                    groups = block.get_submodule(name).weight.float().unflatten(-1, (-1, group_size))
                    limit = groups.abs().amax(-1) * (torch.rand(groups.shape[:2], generator=generator) * 0.5 + 0.6)
                    clips.append(WeightClip(f"{block_name(index)}.{name}", limit.detach()))
    return AwqSearch(tuple(scales), tuple(clips), {"group_size": group_size, **facts})


def write_search(folder: Path, model, group_size=32, **facts) -> Path:
    """A file of `random_search`."""
    path = folder / "search.safetensors"
    save_search(random_search(model, group_size, **facts), path)
    return path


def rounded(weight, group_size, symmetric, dtype=torch.float16):
    """What INT4 leaves of a weight, [N, K] float32, made from codes by hand."""
    int4 = quantize(weight.detach().float(), group_size, symmetric=symmetric, dtype=dtype)
    codes = torch.stack((int4.codes & 15, int4.codes >> 4), -1).flatten(-2).float()
    spread = [part.float().repeat_interleave(group_size, 1) for part in (int4.zeros, int4.scales)]
    return (codes - spread[0]) * spread[1]
