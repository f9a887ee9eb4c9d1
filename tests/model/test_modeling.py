"""The network: masks, merging of image features, selected features, Auto classes, generate."""

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

import vila.hf
from tests import tiny
from tests.pages import numbers
from vila.core.errors import LayoutError
from vila.core.types import Message
from vila.model.modeling import cached_mask, merge_image_embeddings, segment_mask
from vila.model.projector import build_projector, calibrate_projector
from vila.model.vision_tower import select_features


@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize("layer", [-2, 1])
def test_features_are_the_hidden_state_before_the_norm(tower, layer):
    config = tiny.vision_config(tower)
    model = AutoModel.from_config(config).eval()
    pixels = torch.randn(2, 3, 28, 28)
    states = model(pixels, output_hidden_states=True).hidden_states
    assert len(states) == config.num_hidden_layers + 1
    assert torch.equal(select_features(model, config, pixels, layer, "cls_patch"), states[layer])


def test_patch_drops_the_class_token_and_siglip_has_none():
    config = tiny.vision_config("dinov2")
    model = AutoModel.from_config(config).eval()
    pixels = torch.randn(1, 3, 28, 28)
    both = [select_features(model, config, pixels, -1, kind) for kind in ("cls_patch", "patch")]
    assert torch.equal(both[0][:, 1:], both[1])
    with pytest.raises(LayoutError) as caught:
        vila.model.vision_sizes.check_tower(tiny.vision_config("siglip"), "patch")
    assert (caught.value.field, caught.value.value) == ("select_feature", "patch")


def test_a_layer_outside_the_tower_is_refused():
    config = tiny.vision_config()
    with pytest.raises(LayoutError) as caught:
        select_features(AutoModel.from_config(config), config, torch.zeros(1, 3, 28, 28), -5, "patch")
    assert (caught.value.field, caught.value.value) == ("select_layer", -5)


def test_projectors_have_the_published_parameter_names():
    assert list(build_projector("linear", 4, 8).state_dict()) == ["weight", "bias"]
    assert list(build_projector("mlp2x_gelu", 4, 8).state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(build_projector("mlp1x_gelu", 4, 8).state_dict()) == ["0.weight", "0.bias"]
    with pytest.raises(LayoutError) as caught:
        build_projector("mlp2x_relu", 4, 8)
    assert (caught.value.field, caught.value.value) == ("projector_type", "mlp2x_relu")


def test_a_calibrated_projector_has_the_target_scale():
    torch.manual_seed(0)
    projector = build_projector("mlp2x_gelu", 8, 16)
    features = torch.randn(32, 4, 8) * torch.logspace(-2, 2, 8) + 5
    calibrate_projector(projector, features, rms=0.3)
    assert projector(features).square().mean().sqrt().item() == pytest.approx(0.3, rel=1e-3)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_generate_equals_the_greedy_loop_over_full_forwards(family):
    model, processor = tiny.vila(family)
    inputs = processor(text="<image>what?", images=[tiny.image(1)])
    made = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    ids = inputs["input_ids"]
    for _ in range(6):
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"], use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert made.tolist() == ids.tolist()


def test_swapping_two_images_changes_the_logits():
    model, processor = tiny.vila()
    one, two = tiny.image(1), tiny.image(2)
    ahead = processor(text="<image><image>?", images=[one, two])
    back = processor(text="<image><image>?", images=[two, one])
    assert (model(**ahead).logits - model(**back).logits).abs().max() > 1e-2


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_saved_model_loads_through_the_auto_classes_bit_for_bit(family, tmp_path):
    from vila.model.loading import save_model

    model, processor = tiny.vila(family)
    save_model(model, processor, tmp_path / "model")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    reader = AutoProcessor.from_pretrained(tmp_path / "model")
    assert type(again) is type(model)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    text, images = "<image>what?", [tiny.image(3)]
    ours, theirs = processor(text=text, images=images), reader(text=text, images=images)
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    assert torch.equal(model(**ours).logits, again(**theirs).logits)


def test_the_processor_keeps_spec_and_template(tmp_path):
    _, processor = tiny.vila(template="chatml")
    processor.save_pretrained(tmp_path)
    again = (
        AutoProcessor.from_pretrained(tmp_path)
        if (tmp_path / "config.json").exists()
        else type(processor).from_pretrained(tmp_path)
    )
    assert again.spec == processor.spec
    assert again.template == "chatml"
    prompt = (Message.of("user", tiny.image(0), "hi"),)
    assert again.prompt(prompt).ids == processor.prompt(prompt).ids


def test_image_features_replace_placeholders_in_reading_order():
    embeds = torch.zeros(2, 3, 2)
    is_placeholder = torch.tensor([[False, True, True], [True, False, False]])
    out = merge_image_embeddings(embeds, torch.arange(1.0, 7.0).view(3, 1, 2), is_placeholder)
    assert out.tolist() == [[[0, 0], [1, 2], [3, 4]], [[5, 6], [0, 0], [0, 0]]]


def test_gradients_reach_text_and_media():
    embeds = torch.zeros(1, 2, 2, requires_grad=True)
    media = torch.ones(1, 1, 2, requires_grad=True)
    merge_image_embeddings(embeds, media, torch.tensor([[True, False]])).sum().backward()
    assert embeds.grad.tolist() == [[[0, 0], [1, 1]]]
    assert media.grad.tolist() == [[[1, 1]]]


def test_different_counts_are_an_error_with_both_counts():
    with pytest.raises(ValueError) as caught:
        merge_image_embeddings(torch.zeros(1, 2, 2), torch.zeros(2, 2, 2), torch.tensor([[True, False]]))
    assert numbers(str(caught.value))[:2] == [1, 4]


def test_the_mask_of_a_shared_prefix_with_two_branches():
    segments = torch.tensor([[0, 0, 1, 1, 2, -1]])
    parents = torch.tensor([[-1, -1, 0, 0, 0, -1]])
    assert segment_mask(segments, parents)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_a_cached_step_attends_to_valid_columns_and_itself():
    valid = torch.tensor([[True, False, True, True], [True, True, True, False]])
    assert cached_mask(valid, 2)[:, 0].int().tolist() == [[[1, 0, 1, 0], [1, 0, 1, 1]], [[1, 1, 1, 0], [1, 1, 1, 1]]]
