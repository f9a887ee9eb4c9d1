"""Vision towers: the selected hidden state, parity with the published towers, S2 features."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoModel, InternVLVisionConfig

from tests import tiny
from tests.pages import numbers
from tests.reference import internvit_states
from vila.core.errors import LayoutError
from vila.model.vision_sizes import TOWER_TYPES, check_image_size, check_tower, num_patches
from vila.model.vision_tower import multiscale_features, select_features

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
"""A small config of InternViT-6B's type."""


def vision_config(tower):
    """A 4-layer, 16-wide config over 2 x 2 patches."""
    if tower != "internvl":
        return tiny.vision_config(tower)
    sizes = {name: value for name, value in FACTS.items() if name != "model_type"}
    return InternVLVisionConfig(**sizes, norm_type="rms_norm", use_qk_norm=True, attention_bias=False)


def random_tower(tower):
    """Config and model with random norms, scales and position embeddings, as after training."""
    torch.manual_seed(0)
    config = vision_config(tower)
    model = AutoModel.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return config, model


@pytest.fixture(params=["clip", "siglip", "dinov2", "internvl"])
def tower(request):
    return random_tower(request.param)


def images(count=2, size=28):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def published_names(model):
    """Weights of an InternVLVisionModel with InternViT-6B's names: query, key and value fused."""
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
def test_features_are_the_hidden_state_in_transformers_numbering(tower, layer):
    config, model = tower
    states = model(images(), output_hidden_states=True).hidden_states
    assert len(states) == config.num_hidden_layers + 1
    assert torch.equal(select_features(model, config, images(), layer, "cls_patch"), states[layer])


def test_the_last_hidden_state_is_taken_before_the_final_norm(tower):
    config, model = tower
    raw = []
    block = next(m for m in model.modules() if isinstance(m, nn.ModuleList))[-1]
    handle = block.register_forward_hook(lambda module, args, output: raw.append(output))
    final = model(images()).last_hidden_state
    handle.remove()
    assert torch.equal(select_features(model, config, images(), -1, "cls_patch"), raw[0])
    if config.model_type in ("siglip_vision_model", "dinov2"):
        assert (final - raw[0]).abs().max() > 0.1


def test_blocks_after_the_selected_one_do_not_run(tower):
    config, model = tower
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    ran = []
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda module, args, output, number=number: ran.append(number))
    select_features(model, config, images(), -3, "cls_patch")
    assert ran == [0, 1]


def test_the_internvl_tower_computes_the_published_blocks_of_internvit():
    config, model = random_tower("internvl")
    weights = published_names(model)
    assert weights["encoder.layers.3.attn.qkv.weight"].shape == (48, 16)
    wanted = internvit_states(FACTS, weights, images())
    for layer in (1, 2, 3, 4):
        made = select_features(model, config, images(), layer, "cls_patch")
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
def test_images_of_another_size_are_refused(name):
    config, model = random_tower(name)
    with pytest.raises(LayoutError) as caught:
        select_features(model, config, images(size=42), -1, "cls_patch")
    assert "42 x 42" in caught.value.problem and "28 x 28" in caught.value.problem


def test_dinov2_accepts_any_image_size():
    config, model = random_tower("dinov2")
    assert select_features(model, config, images(size=42), -1, "patch").shape == (2, 9, 16)


@pytest.mark.parametrize("name", ["clip", "dinov2", "internvl"])
def test_patch_drops_the_class_token(name):
    config, model = random_tower(name)
    both = [select_features(model, config, images(), -1, kind) for kind in ("cls_patch", "patch")]
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
        select_features(model, config, images(1), layer, "patch")
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


PATCH = 2


def encode(tiles):
    """A toy tower [M, 3, h, w] to [M, P, 5]: each feature depends on the patch's pixels, position and tile."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, PATCH, PATCH, generator=generator).to(tiles.dtype)
    features = torch.nn.functional.conv2d(tiles, weight, stride=PATCH).flatten(2).transpose(1, 2)
    place = torch.linspace(-1, 1, features.shape[1]).to(tiles.dtype)[None, :, None]
    return features + place + tiles.std(dim=(1, 2, 3), correction=0)[:, None, None]


def cubic_weight(distance):
    """The bicubic kernel with a = -0.75, which PyTorch uses."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def cubic_matrix(size, scale):
    """Weights [scale, size] of one axis; samples at pixel centres, the border repeated."""
    matrix = torch.zeros(scale, size, dtype=torch.float64)
    for target in range(scale):
        source = (target + 0.5) * size / scale - 0.5
        for tap in range(math.floor(source) - 1, math.floor(source) + 3):
            matrix[target, min(max(tap, 0), size - 1)] += cubic_weight(source - tap)
    return matrix


def area_mean(grid, side):
    """Average over the window of each target cell: from the floor of its start to the ceiling of its end."""
    size, out = grid.shape[0], grid.new_zeros(side, side, grid.shape[2])
    for row in range(side):
        for column in range(side):
            rows, columns = (range(at * size // side, math.ceil((at + 1) * size / side)) for at in (row, column))
            window = [grid[y, x] for y in rows for x in columns]
            out[row, column] = sum(window) / len(window)
    return out


def by_loops(image, scales, max_split):
    """Features [P, C * len(scales)] of one image [3, H, W]."""
    grids = []
    for scale in sorted(scales):
        rows, columns = (cubic_matrix(size, scale).to(image.dtype) for size in image.shape[1:])
        resized = torch.stack([rows @ channel @ columns.T for channel in image])
        splits = math.ceil(scale / max_split)
        tile, side = scale // splits, scale // splits // PATCH
        grid = torch.zeros(splits * side, splits * side, 5)
        for top in range(splits):
            for left in range(splits):
                cut = resized[None, :, top * tile : (top + 1) * tile, left * tile : (left + 1) * tile]
                for number, feature in enumerate(encode(cut)[0]):
                    grid[top * side + number // side, left * side + number % side] = feature
        grids.append(grid)
    return torch.cat([area_mean(grid, len(grids[0])).flatten(0, 1) for grid in grids], dim=1)


@pytest.mark.parametrize(
    ("size", "scales", "max_split"),
    [
        (8, (4, 8), 4),
        (12, (4, 8, 12), 4),
        (8, (8, 4), 8),
        (8, (4, 6), 6),  # a map of 3 averaged to 2: windows overlap
        (6, (6,), 6),
        (10, (6, 12), 5),  # tiles of 3 and 4: the fewest that fit, evenly
    ],
)
def test_features_equal_a_loop_over_tiles_patches_and_pixels(size, scales, max_split):
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
    made = multiscale_features(encode, pixels, scales, max_split)
    wanted = torch.stack([by_loops(image, scales, max_split) for image in pixels])
    assert made.shape == wanted.shape
    torch.testing.assert_close(made, wanted, atol=2e-5, rtol=0)  # worst of 30: 4.9e-6


def test_tiles_of_a_scale_are_encoded_in_one_batch():
    batches = []

    def watch(tiles):
        batches.append(tiles)
        return encode(tiles)

    pixels = torch.randn(2, 3, 8, 8)
    multiscale_features(watch, pixels, (4, 8), 4)
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 4, 4), (8, 3, 4, 4)]
    assert torch.equal(batches[1][2:4], pixels[..., :4, 4:])
    assert torch.equal(batches[1][4:6], pixels[..., 4:, :4])


def test_a_single_scale_equals_the_tower():
    pixels = torch.randn(2, 3, 8, 8)
    assert torch.equal(multiscale_features(encode, pixels, (8,), 8), encode(pixels))


def test_half_precision_is_resized_and_averaged_in_float32():
    pixels = torch.randn(1, 3, 14, 14, generator=torch.Generator().manual_seed(0)).bfloat16()
    small, large = (
        torch.nn.functional.interpolate(pixels.float(), (scale, scale), mode="bicubic").bfloat16() for scale in (10, 20)
    )
    # Sizes whose ratio is no short binary fraction: resizing in bfloat16 would show.
    assert not torch.equal(small, torch.nn.functional.interpolate(pixels, (10, 10), mode="bicubic"))
    made = multiscale_features(encode, pixels, (10, 20), 20)
    averaged = area_mean(encode(large)[0].unflatten(0, (10, 10)).float(), 5).flatten(0, 1).bfloat16()
    assert made.dtype == torch.bfloat16
    assert torch.equal(made[0, :, :5], encode(small)[0])
    assert torch.equal(made[0, :, 5:], averaged)


def test_gradients_reach_the_images():
    pixels = torch.randn(1, 3, 8, 8, requires_grad=True)
    multiscale_features(encode, pixels, (4, 8), 4).sum().backward()
    assert pixels.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("scales", "max_split", "value"),
    [
        ((4, 10), 4, [4, 10]),
        ((), 4, []),
        ((0, 4), 4, [0, 4]),
        ((4,), 0, [4]),
    ],
)
def test_scales_that_cannot_be_split_are_refused(scales, max_split, value):
    with pytest.raises(LayoutError) as caught:
        multiscale_features(encode, torch.zeros(1, 3, 8, 8), scales, max_split)
    assert (caught.value.field, caught.value.value) == ("s2_scales", value)


def test_a_class_token_is_refused():
    def with_class_token(tiles):
        return torch.cat([encode(tiles)[:, :1], encode(tiles)], dim=1)

    with pytest.raises(LayoutError) as caught:
        multiscale_features(with_class_token, torch.zeros(1, 3, 4, 4), (4,), 4)
    assert 5 in numbers(caught.value.problem) and "select_feature" in caught.value.hint
