"""Towers: which hidden state is taken, and that each computes what was published."""

import pytest
import torch
from torch import nn
from transformers import AutoModel, InternVLVisionConfig

from tests import tiny
from tests.reference import internvit_states
from vila.core.errors import LayoutError
from vila.model.vision_tower import TOWER_TYPES, check_image_size, check_tower, num_patches, select_features

FACTS = {
    "model_type": "intern_vit_6b",
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 28,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
}
"""InternViT-6B's config in small."""


def vision_config(tower):
    """A 4-layer, 16-wide config over 2 x 2 patches."""
    if tower != "internvl":
        return tiny.vision_config(tower)
    sizes = {name: value for name, value in FACTS.items() if name != "model_type"}
    return InternVLVisionConfig(**sizes, norm_type="rms_norm", use_qk_norm=True, attention_bias=False)


def random_tower(tower):
    """Config and model, with random norms, scales and position embeddings, as a trained one has."""
    torch.manual_seed(0)
    config = vision_config(tower)
    model = AutoModel.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return config, model


@pytest.fixture(params=["clip", "siglip", "dinov2", "internvl"])
def tower(request):
    return random_tower(request.param)


def pictures(count=2, size=28):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def published_names(model):
    """The weights of an InternVLVisionModel as InternViT-6B's files name them: query, key and value in one."""
    renames = {
        "embeddings.cls_token": "embeddings.class_embedding",
        "embeddings.position_embeddings": "embeddings.position_embedding",
        "patch_embeddings.projection": "patch_embedding",
        "encoder.layer.": "encoder.layers.",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "lambda_": "ls",
        "attention.projection_layer": "attn.proj",
        "attention.": "attn.",
    }
    weights = {}
    for name, value in model.state_dict().items():
        for ours, theirs in renames.items():
            name = name.replace(ours, theirs)
        weights[name] = value
    for name in [name for name in weights if name.endswith("attn.q_proj.weight")]:
        parts = [weights.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        weights[name.replace("q_proj", "qkv")] = torch.cat(parts)
    return weights


@pytest.mark.parametrize("layer", [-4, -2, -1, 1, 4])
def test_features_are_the_hidden_state_that_transformers_counts(tower, layer):
    config, model = tower
    states = model(pictures(), output_hidden_states=True).hidden_states
    assert len(states) == config.num_hidden_layers + 1
    assert torch.equal(select_features(model, config, pictures(), layer, "cls_patch"), states[layer])


def test_the_last_hidden_state_is_taken_before_the_final_norm(tower):
    config, model = tower
    raw = []
    block = next(m for m in model.modules() if isinstance(m, nn.ModuleList))[-1]
    handle = block.register_forward_hook(lambda module, args, output: raw.append(output))
    final = model(pictures()).last_hidden_state
    handle.remove()
    assert torch.equal(select_features(model, config, pictures(), -1, "cls_patch"), raw[0])
    if config.model_type in ("siglip_vision_model", "dinov2"):
        assert (final - raw[0]).abs().max() > 0.1


def test_blocks_past_the_wanted_one_do_not_run(tower):
    config, model = tower
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    ran = []
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda module, args, output, number=number: ran.append(number))
    select_features(model, config, pictures(), -3, "cls_patch")
    assert ran == [0, 1]


def test_the_internvl_tower_computes_the_published_blocks_of_internvit():
    config, model = random_tower("internvl")
    weights = published_names(model)
    assert weights["encoder.layers.3.attn.qkv.weight"].shape == (48, 16)
    wanted = internvit_states(FACTS, weights, pictures())
    for layer in (1, 2, 3, 4):
        made = select_features(model, config, pictures(), layer, "cls_patch")
        torch.testing.assert_close(made, wanted[layer], atol=2e-5, rtol=0)  # worst of 20 seeds: 1.9e-6


def test_internvit_has_one_square_size_written_as_a_pair():
    config = vision_config("internvl")
    assert list(config.patch_size) == [14, 14]
    assert num_patches(config, 28) == 4
    assert num_patches(InternVLVisionConfig(image_size=448, patch_size=14), 448) == 1024
    with pytest.raises(LayoutError) as caught:
        num_patches(InternVLVisionConfig(image_size=448, patch_size=[14, 7]), 448)
    assert (caught.value.field, caught.value.value) == ("patch_size", [14, 7])


def test_patches_of_the_published_towers():
    assert num_patches(tiny.vision_config("clip"), 336) == 576
    assert num_patches(tiny.vision_config("siglip"), 384) == 729
    with pytest.raises(LayoutError) as caught:
        num_patches(tiny.vision_config("dinov2"), 384)
    assert (caught.value.field, caught.value.value) == ("image_size", 384)


@pytest.mark.parametrize("name", ["clip", "siglip", "internvl"])
def test_a_tower_takes_pictures_of_its_own_size_only(name):
    config, model = random_tower(name)
    with pytest.raises(LayoutError) as caught:
        select_features(model, config, pictures(size=42), -1, "cls_patch")
    assert "42 x 42" in caught.value.problem and "28 x 28" in caught.value.problem


def test_dinov2_takes_any_size():
    config, model = random_tower("dinov2")
    assert select_features(model, config, pictures(size=42), -1, "patch").shape == (2, 9, 16)


@pytest.mark.parametrize("name", ["clip", "dinov2", "internvl"])
def test_patch_drops_the_class_token(name):
    config, model = random_tower(name)
    both = [select_features(model, config, pictures(), -1, kind) for kind in ("cls_patch", "patch")]
    assert both[1].shape == (2, num_patches(config, 28), 16)
    assert torch.equal(both[0][:, 1:], both[1])
    check_tower(config, "patch")


def test_a_selection_that_would_drop_a_real_patch_is_refused():
    with pytest.raises(LayoutError) as caught:
        check_tower(tiny.vision_config("siglip"), "patch")
    assert (caught.value.field, caught.value.value) == ("select_feature", "patch")
    with pytest.raises(LayoutError) as caught:
        check_tower(tiny.vision_config("clip"), "cls")
    assert (caught.value.field, caught.value.value) == ("select_feature", "cls")


def test_an_unknown_tower_is_named_with_the_known_ones():
    with pytest.raises(LayoutError) as caught:
        check_tower(tiny.text_config("llama"), "patch")
    assert (caught.value.field, caught.value.value) == ("model_type", "llama")
    assert all(name in caught.value.expected for name in TOWER_TYPES)


@pytest.mark.parametrize("layer", [0, 5, -5])
def test_a_layer_that_is_no_blocks_output_is_refused(layer):
    config, model = random_tower("clip")
    with pytest.raises(LayoutError) as caught:
        select_features(model, config, pictures(1), layer, "patch")
    assert (caught.value.field, caught.value.value) == ("select_layer", layer)


@pytest.mark.parametrize(
    ("side", "scales", "tile", "field"),
    [
        (42, (), 0, "image_size"),
        (56, (28, 58), 28, "s2_scales"),
        (56, (28, 56), 56, "image_size"),
        (0, (0,), 28, "s2_scales"),
    ],
)
def test_images_that_the_tower_cannot_read_are_refused(side, scales, tile, field):
    check_image_size(tiny.vision_config("clip"), 56, (28, 56), 28)
    with pytest.raises(LayoutError) as caught:
        check_image_size(tiny.vision_config("clip"), side, scales, tile)
    assert caught.value.field == field


def test_a_selection_leaves_no_hook_behind_when_the_tower_fails():
    config, model = random_tower("dinov2")
    with pytest.raises(RuntimeError):
        select_features(model, config, torch.zeros(1, 3, 2, 2), -1, "patch")
    assert not any(module._forward_hooks for module in model.modules())
