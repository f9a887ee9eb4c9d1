"""LoRA adapters: seeded initialisation, training, merging."""

import sys
from types import ModuleType

import pytest
import torch

from tests import tiny
from vila.config.schema import Lora
from vila.core.errors import ConfigError
from vila.core.optional import MissingExtraError
from vila.model.loading import load_model, save_model
from vila.train.lora import adapter_parameters, add_adapters, save_adapter
from vila.train.optimizer import select_trainable

ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def adapted(family="llama", lora=None, **text):
    """A model whose adapters and projector were trained."""
    model, processor = tiny.vila(family, **text)
    add_adapters(model, lora or Lora(rank=4), seed=3)
    select_trainable(model, ("projector", "llm"), adapters=set(adapter_parameters(model)))
    learn(model)
    return model.eval(), processor


def learn(model):
    """Change the trainable weights, as training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def inputs_of(processor):
    return processor(text="<image>what?", images=[tiny.image(1)], return_tensors="pt")


def logits(model, processor):
    with torch.no_grad():
        return model(**inputs_of(processor)).logits


@pytest.mark.parametrize("family", tiny.FAMILIES)
class TestEveryFamily:
    def test_new_adapters_change_nothing_and_are_in_all_linears_but_the_head(self, family):
        model, processor = tiny.vila(family)
        before = logits(model, processor)
        add_adapters(model, Lora(rank=4), seed=3)
        assert torch.equal(logits(model, processor), before)
        names = adapter_parameters(model)
        assert len(names) == 2 * 7 * 2
        assert {name.split(".")[5] for name in names} == ALL
        assert all(model.get_parameter(name).requires_grad for name in names)
        assert [n for n, p in model.named_parameters() if p.requires_grad] == names
        assert not any(module.training for module in model.modules())

    def test_only_adapters_and_projector_get_gradients(self, family):
        model, processor = adapted(family)
        inputs = inputs_of(processor)
        model(**inputs, labels=inputs["input_ids"].clamp(max=99)).loss.backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        projector = {name for name, _ in model.named_parameters() if name.startswith("projector.")}
        assert reached == {*adapter_parameters(model), *projector}


def test_the_seed_alone_draws_and_nothing_else_is_drawn():
    drawn = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)
        state = torch.get_rng_state()
        model, _ = tiny.vila()
        add_adapters(model, Lora(rank=4), seed)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append({name: model.get_parameter(name).detach() for name in adapter_parameters(model)})
    one, same, other = drawn
    for name in one:
        assert torch.equal(one[name], same[name])
        assert torch.equal(one[name], other[name]) == ("lora_B" in name)
        assert one[name].any() == ("lora_A" in name)


def test_adapters_of_a_half_precision_model_are_float32():
    model, processor = tiny.vila()
    model.to(torch.bfloat16)
    add_adapters(model, Lora(rank=4), seed=3)
    assert {model.get_parameter(name).dtype for name in adapter_parameters(model)} == {torch.float32}
    assert logits(model, processor).dtype == torch.bfloat16


def test_dropout_acts_in_training_alone():
    model, processor = adapted(lora=Lora(rank=4, dropout=0.05))
    assert torch.equal(logits(model, processor), logits(model, processor))
    model.language_model.train()
    assert not torch.equal(logits(model, processor), logits(model, processor))


def test_targets_choose_the_linears():
    model, _ = tiny.vila(tower="clip")  # whose tower has a q_proj too
    add_adapters(model, Lora(rank=2, targets=("q_proj", "layers.1.mlp.up_proj")), seed=0)
    assert {name.rpartition(".lora_")[0] for name in adapter_parameters(model)} == {
        "language_model.model.layers.0.self_attn.q_proj",
        "language_model.model.layers.1.self_attn.q_proj",
        "language_model.model.layers.1.mlp.up_proj",
    }


@pytest.mark.parametrize("wrong", ["query", "mlp", "lm_head", "proj"])
def test_a_target_that_is_no_linear_lists_those_there_are(wrong):
    model, _ = tiny.vila()
    with pytest.raises(ConfigError) as caught:
        add_adapters(model, Lora(rank=2, targets=("q_proj", wrong)), seed=0)
    assert (caught.value.field, caught.value.value) == ("stage.lora.targets", wrong)
    assert {"q_proj", "k_proj", "v_proj", "down_proj"} <= set(caught.value.expected.split(", "))
    assert not adapter_parameters(model)


def test_alpha_scales_what_an_adapter_adds():
    added = {}
    for alpha in (8, 16):
        model, _ = adapted(lora=Lora(rank=4, alpha=alpha))
        layer = model.language_model.model.layers[0].mlp.up_proj
        inputs = torch.ones(1, layer.in_features)
        added[alpha] = layer(inputs) - layer.base_layer(inputs)
    assert added[8].any()
    torch.testing.assert_close(added[16], 2 * added[8], rtol=0, atol=1e-6)


class TestWhatIsMissing:
    def test_peft(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(MissingExtraError) as raised:
            add_adapters(tiny.vila()[0], Lora(rank=2), seed=0)
        assert (raised.value.field, raised.value.hint) == ("stage.lora", "pip install 'vila-vlm[lora]'")

    def test_bitsandbytes(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(MissingExtraError) as raised:
            add_adapters(tiny.vila()[0], Lora(rank=2, bits=4), seed=0)
        assert (raised.value.field, raised.value.hint) == ("stage.lora.bits=4", "pip install bitsandbytes")

    def test_a_cuda_device(self, monkeypatch):
        package = ModuleType("bitsandbytes")
        package.nn = ModuleType("bitsandbytes.nn")
        monkeypatch.setitem(sys.modules, "bitsandbytes", package)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ConfigError) as caught:
            add_adapters(tiny.vila()[0], Lora(rank=2, bits=8), seed=0)
        assert (caught.value.field, caught.value.value) == ("stage.lora.bits", 8)


def test_given_tensors_are_written_in_place_of_the_models_own(tmp_path):
    model, processor = adapted()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model, processor)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    save_model(*tiny.vila(), tmp_path / "base")
    save_adapter(model, processor, tmp_path / "adapter", str(tmp_path / "base"), tensors=tensors)
    loaded, _ = load_model(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, processor), expected, rtol=0, atol=1e-5)
