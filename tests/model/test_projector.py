"""Projectors: published names and shapes, merging of patches, initialisation from data."""

import pytest
import torch
from torch import nn

from tests.reference import project
from vila.core.errors import LayoutError
from vila.model.projector import build_projector, calibrate_projector, merge_patches
from vila.model.vision_sizes import num_projected_tokens

KINDS = ("linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "mlp_downsample")


def random_projector(kind: str, width_in: int, width_out: int) -> nn.Module:
    """A projector with random norms, as after training."""
    torch.manual_seed(len(kind))
    projector = build_projector(kind, width_in, width_out)
    for parameter in projector.parameters():
        nn.init.normal_(parameter, std=0.5)
    return projector


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("identity", []),
        ("linear", [""]),
        ("mlp1x_gelu", ["0."]),
        ("mlp2x_gelu", ["0.", "2."]),
        ("mlp3x_gelu", ["0.", "2.", "4."]),
        ("mlp_downsample", ["1.", "2.", "4."]),
    ],
)
def test_parameters_have_the_published_names(kind, layers):
    width_out = 4 if kind == "identity" else 8
    names = list(build_projector(kind, 4, width_out).state_dict())
    assert names == [layer + leaf for layer in layers for leaf in ("weight", "bias")]


def test_mlp_downsample_has_the_published_shapes_and_epsilon():
    projector = build_projector("mlp_downsample", 1152, 16)
    assert {name: tuple(value.shape) for name, value in projector.state_dict().items() if "weight" in name} == {
        "1.weight": (4608,),
        "2.weight": (16, 4608),
        "4.weight": (16, 16),
    }
    assert projector[1].eps == 1e-5


@pytest.mark.parametrize(
    "kind", ["mlp2x_relu", "mlp0x_gelu", "mlpx_gelu", "Linear", "mlp_downsample_3x3_fix", "", "mlp1000x_gelu"]
)
def test_an_unknown_type_is_refused(kind):
    for ask in (lambda: build_projector(kind, 4, 8), lambda: num_projected_tokens(kind, 9)):
        with pytest.raises(LayoutError) as caught:
            ask()
        assert (caught.value.field, caught.value.value) == ("projector_type", kind)


def test_identity_gives_back_the_features_and_refuses_to_change_the_width():
    features = torch.randn(2, 5, 4)
    assert build_projector("identity", 4, 4)(features) is features
    with pytest.raises(LayoutError) as caught:
        build_projector("identity", 4, 8)
    assert (caught.value.field, caught.value.value) == ("projector_type", "identity")


def test_merged_patches_are_in_column_major_order():
    numbers = torch.arange(1.0, 17).reshape(1, 16, 1)
    merged = merge_patches(numbers)
    assert merged[0].tolist() == [[1, 2, 5, 6], [9, 10, 13, 14], [3, 4, 7, 8], [11, 12, 15, 16]]


def test_an_odd_grid_gets_zeros_at_the_bottom_and_at_the_right():
    numbers = torch.arange(1.0, 10).reshape(1, 9, 1)
    assert merge_patches(numbers)[0].tolist() == [[1, 2, 4, 5], [7, 8, 0, 0], [3, 0, 6, 0], [9, 0, 0, 0]]


def test_the_channels_of_a_patch_stay_together():
    features = torch.arange(8.0).reshape(1, 4, 2)
    assert merge_patches(features)[0].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patches", [1, 16, 25])
def test_a_projector_equals_a_loop_over_patches(kind, patches):
    projector = random_projector(kind, 6, 10)
    features = torch.randn(3, patches, 6)
    wanted = project(kind, projector.state_dict(), features)
    made = projector(features)
    assert made.shape == wanted.shape == (3, num_projected_tokens(kind, patches), 10)
    # Equal to the last bit over 20 seeds with torch 2.13; another BLAS may sum in another order.
    torch.testing.assert_close(made, wanted, atol=2e-5, rtol=0)


def test_the_layer_norm_includes_the_padding_of_an_odd_grid():
    projector = random_projector("mlp_downsample", 6, 10)
    seen = []
    projector[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    projector(torch.ones(1, 9, 6))
    assert seen[0][0, -1].tolist() == [1.0] * 6 + [0.0] * 18


def test_images_of_a_batch_are_projected_independently():
    projector, features = random_projector("mlp_downsample", 6, 10), torch.randn(3, 9, 6)
    one_by_one = torch.cat([projector(features[n : n + 1]) for n in range(3)])
    torch.testing.assert_close(projector(features), one_by_one, atol=1e-5, rtol=0)
    assert projector(features[:0]).shape == (0, 4, 10)


def test_the_published_grids_give_the_published_lengths():
    assert [num_projected_tokens("mlp_downsample", patches) for patches in (576, 729, 1024)] == [144, 196, 256]
    assert [num_projected_tokens(kind, 577) for kind in ("identity", "linear", "mlp2x_gelu")] == [577] * 3


def test_patches_must_be_a_square_grid_to_be_merged():
    for ask in (lambda: num_projected_tokens("mlp_downsample", 577), lambda: merge_patches(torch.zeros(1, 577, 2))):
        with pytest.raises(LayoutError) as caught:
            ask()
        assert "577" in caught.value.problem and "select_feature" in caught.value.hint


@pytest.mark.parametrize("kind", KINDS)
def test_a_calibrated_projector_has_the_target_scale(kind):
    torch.manual_seed(0)
    projector = build_projector(kind, 8, 16)
    features = torch.randn(32, 9, 8) * torch.logspace(-2, 2, 8) + 5
    calibrate_projector(projector, features, rms=0.3)
    assert projector(features).square().mean().sqrt().item() == pytest.approx(0.3, rel=1e-3)


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "mlp_downsample"])
def test_calibration_composes_the_first_layer_with_the_standardisation_of_its_channels(kind):
    torch.manual_seed(0)
    projector = build_projector(kind, 8, 16)
    first = next(module for module in projector.modules() if isinstance(module, nn.Linear))
    before = nn.Linear(first.in_features, 16)
    before.load_state_dict(first.state_dict())
    features = torch.randn(64, 9, 8) * torch.logspace(-1, 1, 8) + 2
    calibrate_projector(projector, features, rms=0.3)
    seen = []
    first.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    projector(features)
    inputs, outputs = (value.flatten(0, 1) for value in seen[0])
    standard = (inputs - inputs.mean(0)) / inputs.std(0)
    torch.testing.assert_close(outputs, before(standard), atol=1e-4, rtol=1e-4)


def test_an_identity_has_nothing_to_calibrate():
    with pytest.raises(LayoutError) as caught:
        calibrate_projector(build_projector("identity", 4, 4), torch.randn(2, 4, 4), rms=0.3)
    assert "projector_init" in caught.value.hint
