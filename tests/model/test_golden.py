"""Golden cases computed by the released code on a CPU, with their tolerances; see tests/golden."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vila.model.loading import load_model

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINTS = {"v1": "llava-vicuna-tiny-mlp2x", "v15": "vila15-llama-tiny-siglip70-downsample"}
CASES = [(layout, case.name) for layout in CHECKPOINTS for case in sorted((GOLDEN / layout / "cases").iterdir())]


@pytest.fixture(scope="module")
def loaded():
    return {layout: load_model(GOLDEN / layout / "checkpoints" / name) for layout, name in CHECKPOINTS.items()}


@pytest.mark.parametrize(("layout", "name"), CASES)
@torch.inference_mode()
def test_intermediates_equal_those_of_the_released_code(loaded, layout, name):
    model, processor = loaded[layout]
    case = json.loads((GOLDEN / layout / "cases" / name / "case.json").read_text())
    expected = load_file(GOLDEN / layout / "cases" / name / "tensors.safetensors")
    images = [GOLDEN / "pixels" / image for image in case["images"]]
    inputs = processor(
        text=case["prompt"], images=images, image_aspect_ratio=case["image_aspect_ratio"], return_tensors="pt"
    )
    placeholders = [model.config.image_token_id] * processor.spec.tokens_per_image
    ids = [token for i in case["input_ids"] for token in (placeholders if i == -200 else [i])]
    assert inputs["input_ids"][0].tolist() == ids
    assert len(ids) == case["spliced_length"]

    def close(got, key, tolerance):
        torch.testing.assert_close(got.reshape(expected[key].shape), expected[key], rtol=0, atol=tolerance)

    close(inputs["pixel_values"], "pixel_values", 2e-6)
    features = model.vision_features(inputs["pixel_values"])
    close(features, "vision_features", 2e-5)
    close(model.project(features), "projected_features", 2e-5)
    close(model.embed(inputs["input_ids"], model.project(features)), "inputs_embeds", 5e-5)
    logits = model(**inputs).logits
    close(logits, "logits", 2e-4)
    new = model.generate(**inputs, max_new_tokens=len(case["greedy_new_ids"]), do_sample=False)
    assert new[0, len(ids) :].tolist() == case["greedy_new_ids"]
    if len(images) > 1:
        inputs["pixel_values"] = inputs["pixel_values"].flip(0)
        assert (model(**inputs).logits - logits)[0, -1].abs().max() > 1e-2
