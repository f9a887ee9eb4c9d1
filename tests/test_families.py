"""The table of LLM families agrees with transformers and with the tiny models that the other tests use."""

from types import SimpleNamespace

import pytest
import transformers

from tests import tiny
from vila.core.errors import UnknownNameError
from vila.families import FAMILIES, FAMILY_BY_LLAVA_TYPE, attention_windows, find_family, unsupported_blocks


def test_every_family_has_a_tiny_model():
    assert set(FAMILIES) == set(tiny.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_class_and_layer_names_are_those_of_transformers(family):
    model = transformers.AutoModelForCausalLM.from_config(tiny.text_config(family.model_type))
    layers = model.get_decoder().layers
    assert type(model).__name__ == family.causal_lm
    assert type(layers[0]).__name__ == family.decoder_block
    assert {name for name, module in layers[0].named_modules() if hasattr(module, "weight")} == family.block_layers
    assert not list(unsupported_blocks(model.config, layers))


def test_llava_model_types_belong_to_one_family_each():
    names = [name for family in FAMILIES.values() for name in family.llava_model_types]
    assert len(names) == len(set(names)) == len(FAMILY_BY_LLAVA_TYPE)


def test_an_unknown_family_has_near_names():
    with pytest.raises(UnknownNameError) as caught:
        find_family("qwen")
    assert caught.value.near == ["qwen2"]


def test_blocks_with_another_activation_or_layer_are_unsupported():
    config = tiny.text_config("llama", hidden_act="gelu")
    layers = transformers.AutoModelForCausalLM.from_config(tiny.text_config("llama")).get_decoder().layers
    del layers[0].mlp.up_proj
    assert len(list(unsupported_blocks(config, layers))) == 2


def test_windows_follow_the_layer_types():
    kinds = ["sliding_attention", "full_attention"]
    assert attention_windows(SimpleNamespace(sliding_window=8, layer_types=kinds, num_hidden_layers=2)) == [8, None]
    assert attention_windows(SimpleNamespace(sliding_window=8, num_hidden_layers=2)) == [8, 8]
