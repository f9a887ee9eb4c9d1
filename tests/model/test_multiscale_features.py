"""S2 features against loops over single pixels and patches."""

import math

import pytest
import torch

from vila.core.errors import LayoutError
from vila.model.vision_tower import multiscale_features

PATCH = 2


def encode(tiles):
    """A tower in small: [M, 3, h, w] to [M, P, 5], every patch knowing its pixels, its place and its whole tile."""
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


def by_loops(picture, scales, max_split):
    """Features [P, C * len(scales)] of one picture [3, H, W]."""
    grids = []
    for scale in sorted(scales):
        rows, columns = (cubic_matrix(size, scale).to(picture.dtype) for size in picture.shape[1:])
        resized = torch.stack([rows @ channel @ columns.T for channel in picture])
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
    wanted = torch.stack([by_loops(picture, scales, max_split) for picture in pixels])
    assert made.shape == wanted.shape
    torch.testing.assert_close(made, wanted, atol=2e-5, rtol=0)  # worst of 30: 4.9e-6


def test_tiles_are_encoded_in_one_batch_a_scale_place_by_place_and_row_by_row():
    batches = []

    def watch(tiles):
        batches.append(tiles)
        return encode(tiles)

    pixels = torch.randn(2, 3, 8, 8)
    multiscale_features(watch, pixels, (4, 8), 4)
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 4, 4), (8, 3, 4, 4)]
    assert torch.equal(batches[1][2:4], pixels[..., :4, 4:])
    assert torch.equal(batches[1][4:6], pixels[..., 4:, :4])


def test_one_scale_of_the_pictures_own_size_is_the_tower_itself():
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


def test_gradients_reach_the_pictures():
    pixels = torch.randn(1, 3, 8, 8, requires_grad=True)
    multiscale_features(encode, pixels, (4, 8), 4).sum().backward()
    assert pixels.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("scales", "max_split", "value"),
    [
        ((4, 10), 4, 10),
        ((), 4, []),
        ((0, 4), 4, [0, 4]),
        ((4,), 0, [4]),
    ],
)
def test_scales_that_cannot_be_cut_are_refused(scales, max_split, value):
    with pytest.raises(LayoutError) as caught:
        multiscale_features(encode, torch.zeros(1, 3, 8, 8), scales, max_split)
    assert (caught.value.field, caught.value.value) == ("s2_scales", value)


def test_a_class_token_is_refused():
    def with_class_token(tiles):
        return torch.cat([encode(tiles)[:, :1], encode(tiles)], dim=1)

    with pytest.raises(LayoutError) as caught:
        multiscale_features(with_class_token, torch.zeros(1, 3, 4, 4), (4,), 4)
    assert "5 features" in caught.value.problem and "select_feature" in caught.value.hint
