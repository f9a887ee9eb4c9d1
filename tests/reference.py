"""Reference outputs of published checkpoints (LLaVA-1.5 and VILA-1.5 layouts), by transformers modules, without vila.

Run as `python tests/reference.py CHECKPOINT --ids ids.json --pixels pixels.safetensors --out out.safetensors`.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM


def read(folder):
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    parts = [load_file(f) if f.suffix == ".safetensors" else torch.load(f, weights_only=True) for f in files]
    return json.loads((folder / "config.json").read_text()), {n: v.float() for part in parts for n, v in part.items()}


def after(word, weights):
    return {name.split(word, 1)[1]: value for name, value in weights.items() if word in name}


def stock(auto, facts, weights):
    """CLIPVisionModel, SiglipVisionModel or LlamaForCausalLM; the prefix `vision_model.` depends on the version."""
    model = auto.from_config(AutoConfig.for_model(**facts), attn_implementation="eager", dtype=torch.float32).eval()
    model.load_state_dict({name: weights[name.removeprefix("vision_model.")] for name in model.state_dict()})
    return model


def internvit_states(facts, weights, pixels):
    rms = partial(F.rms_norm, normalized_shape=[facts["hidden_size"]], eps=facts["layer_norm_eps"])
    w = after("embeddings.", weights)
    x = F.conv2d(pixels, w["patch_embedding.weight"], w["patch_embedding.bias"], stride=facts["patch_size"])
    x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)
    states = [x + w["position_embedding"]]
    for number in range(facts["num_hidden_layers"]):
        x, w = states[-1], after(f"encoder.layers.{number}.", weights)
        q, k, v = F.linear(rms(x, weight=w["norm1.weight"]), w["attn.qkv.weight"], w.get("attn.qkv.bias")).chunk(3, -1)
        parts = rms(q, weight=w["attn.q_norm.weight"]), rms(k, weight=w["attn.k_norm.weight"]), v
        q, k, v = (part.unflatten(-1, (facts["num_attention_heads"], -1)).transpose(1, 2) for part in parts)
        mixed = ((q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + w["ls1"] * F.linear(mixed, w["attn.proj.weight"], w["attn.proj.bias"])
        inner = F.gelu(F.linear(rms(x, weight=w["norm2.weight"]), w["mlp.fc1.weight"], w["mlp.fc1.bias"]))
        states.append(x + w["ls2"] * F.linear(inner, w["mlp.fc2.weight"], w["mlp.fc2.bias"]))
    return states


def s2(encode, pixels, config):
    maps = []
    for scale in sorted(int(scale) for scale in config["s2_scales"].split(",")):
        step = scale // math.ceil(scale / config["s2_max_split_size"])
        cuts, big = range(0, scale, step), F.interpolate(pixels, (scale, scale), mode="bicubic")
        rows = [[encode(big[..., y : y + step, x : x + step]).transpose(1, 2) for x in cuts] for y in cuts]
        rows = [[tile.unflatten(2, [math.isqrt(tile.shape[2])] * 2) for tile in row] for row in rows]
        maps.append(torch.cat([torch.cat(row, 3) for row in rows], 2))
    return torch.cat([F.interpolate(m, maps[0].shape[2:], mode="area") for m in maps], 1).flatten(2).transpose(1, 2)


def merged_patches(side):
    """The four patches, counted from 1, of every output token; 0 is the zero patch beyond an odd grid."""
    half = range((side + 1) // 2)
    blocks = [[(2 * row + i, 2 * column + j) for i in (0, 1) for j in (0, 1)] for column in half for row in half]
    return [[1 + r * side + c if max(r, c) < side else 0 for r, c in block] for block in blocks]


def project(kind, w, x):
    fixed = {"identity": [], "linear": [""], "mlp_downsample": ["2.", "4."]}
    layers = fixed[kind] if kind in fixed else [f"{2 * n}." for n in range(int(kind[3 : kind.index("x_gelu")]))]
    if kind == "mlp_downsample":
        assert merged_patches(4) == [[1, 2, 5, 6], [9, 10, 13, 14], [3, 4, 7, 8], [11, 12, 15, 16]]
        padded, blocks = F.pad(x, (0, 0, 1, 0)), merged_patches(math.isqrt(x.shape[1]))
        x = torch.stack([torch.cat([padded[:, number] for number in block], -1) for block in blocks], 1)
        x = F.layer_norm(x, x.shape[2:], w["1.weight"], w["1.bias"], 1e-5)
    for number, name in enumerate(layers):
        x = F.linear(F.gelu(x) if number else x, w[name + "weight"], w[name + "bias"])
    return x


@torch.no_grad()
def reference(checkpoint: Path, ids: list[int], pixels: torch.Tensor, root: Path | None = None):
    """Return vision features, projected features, embeddings and logits of one sequence.

    ids:    token ids, -200 for each image of `pixels` [N, 3, H, W].
    root:   base directory of a relative tower path.
    """
    config, llm = read(checkpoint)
    if llm:
        facts, vision = read((root or checkpoint.parent) / config["mm_vision_tower"])
        text, vision = config | {"model_type": "llama"}, after("vision_model.", llm) or vision
        kind, w = config.get("mm_projector_type", "linear"), after("mm_projector.", llm)
    else:
        (text, llm), (head, w) = read(checkpoint / "llm"), read(checkpoint / "mm_projector")
        (facts, vision), kind, w = read(checkpoint / "vision_tower"), head["mm_projector_type"], after("layers.", w)
    facts, vision = facts.get("vision_config", facts), after("vision_model.", vision) or vision
    tower = None if facts["model_type"] == "intern_vit_6b" else stock(AutoModel, facts, vision)
    model = stock(AutoModelForCausalLM, text, {"lm_head.weight": llm["model.embed_tokens.weight"]} | llm)
    start = {"patch": 1, "cls_patch": 0}[config.get("mm_vision_select_feature", "patch")]

    def encode(x):
        states = tower(x, output_hidden_states=True).hidden_states if tower else internvit_states(facts, vision, x)
        return states[config["mm_vision_select_layer"]][:, start:]

    features = (s2(encode, pixels, config) if config.get("s2") else encode(pixels)).contiguous()
    projected, look_up = project(kind, w, features.clone()), model.get_input_embeddings()
    assert ids.count(-200) == len(projected), f"{ids.count(-200)} placeholders, {len(projected)} images"
    images = iter(projected)
    pieces = [next(images) if token == -200 else look_up(torch.tensor([token])) for token in ids]
    embeds = torch.cat(pieces)[: text.get("tokenizer_model_max_length")]
    logits = model(inputs_embeds=embeds[None], use_cache=False).logits[0]
    return {"vision": features, "projected": projected, "embeds": embeds, "logits": logits}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("checkpoint", "--ids", "--pixels", "--root", "--out"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    given.pixels, given.ids = load_file(given.pixels)["pixel_values"], json.loads(given.ids.read_text())
    save_file(reference(given.checkpoint, given.ids, given.pixels, given.root), given.out)
