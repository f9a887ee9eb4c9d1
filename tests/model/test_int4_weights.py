"""The logits of a 4-bit model equal those of the dequantized weights, for every dtype and backend."""

import pytest
import torch

from tests import tiny
from vila.core.errors import LayoutError
from vila.core.types import Message
from vila.engine.engine import Engine
from vila.kernels.int4 import Int4Linear, dequantize, quantize
from vila.kernels.select import use_backend
from vila.model.int4_weights import dequantize_model, group_size_of, int4_weights, use_int4
from vila.quant.apply import quantize_model

QUERY = "language_model.model.layers.0.self_attn.q_proj"


def quantized(family="llama", **text):
    model, processor = tiny.vila(family, **text)
    weights = quantize_model(model, None, 32, release=True)
    use_int4(model, weights)
    return model, processor, weights


def inputs_of(processor):
    return processor(text="<image>What?", images=[tiny.image(0)], return_tensors="pt")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_are_those_of_the_rounded_weights(family):
    model, processor, weights = quantized(family)
    plain, _ = tiny.vila(family)
    for name, weight in weights.items():
        plain.get_submodule(name).weight.data = dequantize(weight)
    inputs = inputs_of(processor)
    expected, unrounded = plain(**inputs).logits, tiny.vila(family)[0](**inputs).logits
    # The reference multiplies by the very same numbers.
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-5)
    assert (expected - unrounded).abs().max() > 0.05


def test_every_linear_of_the_blocks_is_replaced_and_nothing_else():
    model, _, weights = quantized()
    assert list(int4_weights(model)) == list(weights)
    assert len(weights) == 2 * 7
    assert {type(model.get_submodule(name)) for name in weights} == {Int4Linear}
    assert isinstance(model.language_model.lm_head, torch.nn.Linear)
    assert not any(isinstance(part, Int4Linear) for part in model.vision_tower.modules())
    assert int4_weights(tiny.vila()[0]) == {}
    assert (group_size_of(model), group_size_of(tiny.vila()[0])) == (32, None)


def test_memory_is_four_bits_per_weight():
    model, _, weights = quantized()
    held = sum(p.nbytes for p in model.get_decoder().layers.parameters())
    held += sum(b.nbytes for b in model.get_decoder().layers.buffers())
    norms = sum(p.nbytes for name, p in model.get_decoder().layers.named_parameters() if "norm" in name)
    assert held == norms + sum(weight.num_bytes for weight in weights.values())
    # Shared, not copied.
    assert all(int4_weights(model)[name].codes is weight.codes for name, weight in weights.items())


def test_biases_are_kept():
    model, processor, _ = quantized("qwen2")
    bias = model.get_submodule(QUERY).bias
    assert torch.equal(bias, tiny.vila("qwen2")[0].get_submodule(QUERY).bias)
    before = model(**inputs_of(processor)).logits
    model.get_submodule(QUERY).bias = bias + 1
    assert (model(**inputs_of(processor)).logits - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Worst of the three families: 0.0075 and 0.10 (in full precision 0.014 and 0.13), with logits of about 2.
    [(torch.float16, 0.02), (torch.bfloat16, 0.2)],
)
def test_activations_may_be_of_any_type(dtype, tolerance):
    model, processor, _ = quantized()
    inputs = inputs_of(processor)
    expected = model(**inputs).logits
    scales = int4_weights(model)[QUERY].scales.clone()
    model.to(dtype)
    logits = model(**inputs).logits
    assert logits.dtype == dtype
    assert (logits.float() - expected).abs().max() < tolerance
    # Casting the model does not round the scales again.
    assert torch.equal(int4_weights(model)[QUERY].scales, scales)


def test_a_backend_can_be_chosen_and_agrees():
    model, processor, _ = quantized()
    inputs = inputs_of(processor)
    expected = model(**inputs).logits
    choice = use_backend(model, "aten", dtype=torch.float32)
    assert (choice.name, choice.num_layers) == ("aten", 14)
    # Measured: 2e-6.
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-4)


def test_generate_and_the_engine_answer_as_with_the_rounded_weights():
    model, processor, _ = quantized()
    inputs = inputs_of(processor)

    def answers():
        asked = [Message.of("user", tiny.image(0), "What?")]
        return model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist(), Engine(model, processor).generate(
            asked, max_new_tokens=6
        )

    first = answers()
    dequantize_model(model)
    assert answers() == first


def test_dequantize_model_restores_linears():
    model, processor, _ = quantized("qwen2")
    inputs = inputs_of(processor)
    expected = model(**inputs).logits
    dequantize_model(model)
    assert int4_weights(model) == {}
    assert model.get_submodule(QUERY).weight.dtype == torch.float32
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-5)


def test_mismatched_weights_are_all_listed_and_nothing_changes():
    model, _ = tiny.vila()
    fits = quantize(torch.randn(32, 32), 32)
    wrong = {
        QUERY: fits,
        "language_model.model.layers.0.mlp.up_proj": fits,
        "language_model.model.layers.9.mlp.up_proj": fits,
        "language_model.model.layers.0.input_layernorm": fits,
        "projector.0": fits,
    }
    with pytest.raises(LayoutError) as caught:
        use_int4(model, wrong)
    text = caught.value.problem
    assert all(part in text for part in ("layers.0.mlp.up_proj", "[64, 32]", "[32, 32]"))
    assert "layers.9.mlp.up_proj" in text
    assert "layers.0.input_layernorm" in text and "LlamaRMSNorm" in text
    assert "projector.0" in text
    assert int4_weights(model) == {}
    use_int4(model, {QUERY: fits})
    with pytest.raises(LayoutError) as caught:
        use_int4(model, {QUERY: fits})
    assert QUERY in caught.value.problem
