"""A template whose special tokens the tokenizer lacks is refused before weights are read."""

import pytest

from tests import tiny
from tests.train.stand import stand_recipe, write_stand
from vila.chat.templates import TEMPLATES
from vila.chat.tokenize import check_special_tokens
from vila.core.errors import LayoutError, TemplateError
from vila.model import build
from vila.model.load import load_model, open_parts, save_model
from vila.train.model import open_start

LACKING = ["vicuna_v1", "llama_2", "llama_3", "mistral"]
WRITTEN = ["chatml", "hermes-2", "mpt", "starter_qa", "caption", "page", "llava_v0"]


def test_the_special_tokens_of_a_template_are_read_off_its_texts():
    assert TEMPLATES["vicuna_v1"].special_tokens == {"</s>"}
    assert TEMPLATES["starter_qa"].special_tokens == {"{eos}"}
    assert TEMPLATES["chatml"].special_tokens == {"<|im_start|>", "<|im_end|>"}
    assert TEMPLATES["v0_mmtag"].special_tokens == frozenset()


@pytest.mark.parametrize("name", LACKING)
def test_a_token_that_the_tokenizer_lacks_is_named(name):
    with pytest.raises(TemplateError) as caught:
        check_special_tokens(TEMPLATES[name], tiny.tokenizer(), 300)
    assert (caught.value.field, caught.value.value) == ("template", name)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_template_that_the_tokenizer_can_write_is_accepted(name):
    check_special_tokens(TEMPLATES[name], tiny.tokenizer(), 300)


def test_a_token_without_an_embedding_is_named():
    with pytest.raises(TemplateError) as caught:
        check_special_tokens(TEMPLATES["chatml"], tiny.tokenizer(), 2)
    assert "<|im_end|> (2)" in caught.value.problem


@pytest.fixture
def model(tmp_path):
    save_model(*tiny.vila(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def unbuilt(monkeypatch):
    def built(*_):
        raise AssertionError("a module was built")

    monkeypatch.setattr(build, "VilaForConditionalGeneration", built)


def test_loading_with_such_a_template_is_refused(model, unbuilt):
    with pytest.raises(TemplateError) as caught:
        load_model(model, template="vicuna_v1")
    assert (caught.value.file, caught.value.value) == (str(model), "vicuna_v1")


@pytest.mark.parametrize(
    "change", ["model.template=llama_3", "data.template=llama_3", "data.mixture.0.template=llama_3"]
)
def test_training_with_such_a_template_is_refused(tmp_path, unbuilt, change):
    recipe = stand_recipe(write_stand(tmp_path), tmp_path / "out", "budget.tokens=200", change)
    with pytest.raises(TemplateError) as caught:
        open_start(recipe)
    assert caught.value.value == "llama_3"


def test_class_tokens_of_a_tower_without_one_are_refused(tmp_path, unbuilt):
    from tests.config.small_parts import write_parts

    parts = write_parts(tmp_path)
    facts = {"llm": str(parts / "llm"), "projector": "mlp2x_gelu", "image_size": 28, "image_mode": "pad"}
    with pytest.raises(LayoutError) as caught:
        open_parts(**facts, vision=str(parts / "siglip"), select_layer=-2, select_feature="patch", template="chatml")
    assert (caught.value.field, caught.value.value) == ("select_feature", "patch")
