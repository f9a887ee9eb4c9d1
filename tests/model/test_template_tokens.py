"""A template whose special tokens the tokenizer lacks is refused before weights are read."""

import json

import pytest
import yaml

from tests import tiny
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.chat.content import parse_messages
from vila.chat.templates import TEMPLATES
from vila.chat.tokenize import check_special_tokens
from vila.config.load import load_recipe
from vila.core.errors import LayoutError, TemplateError
from vila.engine.engine import Engine
from vila.model import loading
from vila.model.loading import load_model, open_components, save_model
from vila.train.train_state import load_initial_model, open_initial_model

LACKING = ["vicuna_v1", "llama_2", "llama_3", "mistral"]
WRITTEN = ["chatml", "hermes-2", "mpt", "starter_qa", "caption", "page", "llava_v0"]


def test_special_tokens_of_a_template():
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

    monkeypatch.setattr(loading, "VilaForConditionalGeneration", built)


def test_loading_with_such_a_template_is_refused(model, unbuilt):
    with pytest.raises(TemplateError) as caught:
        load_model(model, template="vicuna_v1")
    assert (caught.value.file, caught.value.value) == (str(model), "vicuna_v1")


@pytest.mark.parametrize(
    "change", ["model.template=llama_3", "data.template=llama_3", "data.mixture.0.template=llama_3"]
)
def test_training_with_such_a_template_is_refused(tmp_path, unbuilt, change):
    recipe = tiny_recipe(write_training_files(tmp_path), tmp_path / "out", "budget.tokens=200", change)
    with pytest.raises(TemplateError) as caught:
        open_initial_model(recipe)
    assert caught.value.value == "llama_3"


def test_class_tokens_of_a_tower_without_one_are_refused(tmp_path, unbuilt):
    from tests.config.tiny_inputs import write_parts

    parts = write_parts(tmp_path)
    facts = {"llm": str(parts / "llm"), "projector": "mlp2x_gelu", "image_size": 28, "image_mode": "pad"}
    with pytest.raises(LayoutError) as caught:
        open_components(
            **facts, vision=str(parts / "siglip"), select_layer=-2, select_feature="patch", template="chatml"
        )
    assert (caught.value.field, caught.value.value) == ("select_feature", "patch")


def test_fine_tuning_keeps_template_and_image_settings_that_the_recipe_does_not_name(tmp_path):
    folder = write_training_files(tmp_path)
    model, processor = load_model(folder / "base")
    spec = {**processor.vision_spec, "image_mode": "resize", "exif_orientation": False}
    model.config.vision_spec = processor.vision_spec = spec
    model.config.template = processor.template = "chatml"
    save_model(model, processor, folder / "base")
    text = yaml.safe_dump(
        {
            "name": "r",
            "model": {"path": str(folder / "base")},
            "stage": {"tune": ["projector"], "lr": 1e-3},
            "data": {"max_length": 96, "mixture": [{"format": "messages", "path": str(folder / "data.jsonl")}]},
            "batch": {"rows": 2},
            "budget": {"tokens": 200},
            "output": {"dir": str(tmp_path / "out")},
        }
    )
    (tmp_path / "r.yaml").write_text(text)
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    _, trained = load_initial_model(recipe, open_initial_model(recipe))
    assert (trained.template, trained.spec.image_mode, trained.spec.exif_orientation) == ("chatml", "resize", False)
    changed = load_recipe(str(tmp_path / "r.yaml"), ["model.image_mode=pad", "model.template=starter_qa"])
    _, trained = load_initial_model(changed, open_initial_model(changed))
    assert (trained.template, trained.spec.image_mode, trained.spec.exif_orientation) == ("starter_qa", "pad", False)


def test_error_of_a_recipe_names_the_checkpoint_whose_tokenizer_lacks_a_token(training_folder, tmp_path):
    model, processor = tiny.vila()
    save_model(model, processor, tmp_path / "base")
    file = tmp_path / "base" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": None}))
    with pytest.raises(TemplateError) as caught:
        open_initial_model(tiny_recipe(training_folder, "x", f"model.path={tmp_path / 'base'}"))
    assert caught.value.file == str(tmp_path / "base")


def test_a_template_that_is_chosen_for_a_request_is_checked():
    _, processor = tiny.vila()
    conversation = [{"role": "user", "content": "hello"}]
    assert processor.apply_chat_template(conversation, template="chatml", tokenize=True)
    for ask in (
        lambda: processor.tokens(parse_messages(conversation), "vicuna_v1"),
        lambda: processor.apply_chat_template(conversation, template="vicuna_v1", tokenize=True),
        lambda: Engine(*tiny.vila()).generate(conversation, template="vicuna_v1", max_new_tokens=1),
    ):
        with pytest.raises(TemplateError) as caught:
            ask()
        assert (caught.value.field, caught.value.value) == ("template", "vicuna_v1")


def test_a_template_of_a_checkpoint_is_checked_where_a_command_loads_it(tmp_path):
    save_model(*tiny.vila(template="vicuna_v1"), tmp_path / "model")
    with pytest.raises(TemplateError) as caught:
        Engine.load(tmp_path / "model").generate("hello", max_new_tokens=1)
    assert (caught.value.field, caught.value.value) == ("template", "vicuna_v1")
    # What asks nothing of the model may still read it, and another template can be given.
    load_model(tmp_path / "model")
    assert load_model(tmp_path / "model", template="chatml")[1].find_template().name == "chatml"
