"""What is known about configs and weights without transformers equals what transformers builds."""

import dataclasses

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests import tiny
from tests.model.layouts.published import FIXTURES
from vila.core.reading import Fields
from vila.model.expected_weights import _projector, expected_weights
from vila.model.inspect import inspect_checkpoint, is_loadable
from vila.model.int4_weights import use_int4
from vila.model.layouts.config_file import _LEFT_OUT, text_config, tower_config
from vila.model.layouts.detect import open_folder
from vila.model.loading import open_checkpoint, save_model
from vila.model.projector import build_projector
from vila.model.settings import DEFAULTS, PartConfig
from vila.quant.apply import quantize_model

BASE = {"dtype", "output_hidden_states", "transformers_version", "rope_parameters"}
SIZES = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2, "intermediate_size": 128}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_defaults_are_those_of_the_config_class(kind):
    fields = {field.name: field.default for field in dataclasses.fields(CONFIG_MAPPING[kind])}
    assert {key: fields[key] for key in DEFAULTS[kind]} == DEFAULTS[kind]
    unused = {"apply_layernorm", "reshape_hidden_states", "layer_types"}
    assert fields.keys() - _LEFT_OUT - BASE - unused - DEFAULTS[kind].keys() == set()


@pytest.mark.parametrize("kind", DEFAULTS)
@pytest.mark.parametrize("extra", [{}, {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"image_size": [28, 28]}])
def test_plain_attributes_are_those_of_the_built_config(kind, extra):
    read = text_config if "vocab_size" in DEFAULTS[kind] else tower_config
    plain = read(Fields({**SIZES, **extra}, "config.json"), kind)
    assert isinstance(plain, PartConfig)
    built = plain.build()
    for key in (*DEFAULTS[kind], "model_type"):
        if key != "sliding_window":
            assert getattr(plain, key) == getattr(built, key), key
    if read is text_config:
        rope = {key: value for key, value in built.rope_parameters.items() if key != "rope_theta"}
        assert {key: rope[key] for key in plain.rope_parameters} == plain.rope_parameters


@pytest.mark.parametrize(
    "given",
    [
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        {"bos_token_id": None, "eos_token_id": [1, 2]},
    ],
)
def test_values_that_need_transformers_are_read_with_it(given):
    assert not isinstance(text_config(Fields({**SIZES, **given}, "config.json"), "llama"), PartConfig)


def test_a_changed_attribute_is_changed_in_the_built_config():
    plain = text_config(Fields(SIZES, "config.json"), "llama")
    plain.tie_word_embeddings = True
    plain.vocab_size = 77
    built = plain.build()
    assert (built.tie_word_embeddings, built.vocab_size, built.hidden_size) == (True, 77, 64)


MODELS = {
    "llama, dinov2": {},
    "llama, clip": {"tower": "clip"},
    "llama, siglip": {"tower": "siglip"},
    "qwen2": {"family": "qwen2"},
    "mistral": {"family": "mistral"},
    "untied": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("case", MODELS)
def test_expected_weights_are_those_of_the_model(tmp_path, case):
    model, processor = tiny.vila(**MODELS[case])
    save_model(model, processor, tmp_path / "m")
    files = open_folder(tmp_path / "m")
    stored = {name: ref.shape for name, ref in files.tensors.items()}
    assert expected_weights(files.settings) == stored
    assert is_loadable(files)


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "mlp_downsample"])
def test_expected_weights_of_a_projector_are_those_of_the_module(kind):
    built = build_projector(kind, 6, 8).state_dict()
    assert dict(_projector(kind, 6, 8)) == {name: tuple(tensor.shape) for name, tensor in built.items()}


def test_other_weights_and_tokenizers_are_left_to_loading(tmp_path):
    save_model(*tiny.vila(), tmp_path / "m")
    files = open_folder(tmp_path / "m")
    assert is_loadable(files)
    assert not is_loadable(dataclasses.replace(files, unexpected=["x"]))
    first = next(iter(files.tensors))
    assert not is_loadable(
        dataclasses.replace(files, tensors={n: files.tensors[n] for n in files.tensors if n != first})
    )
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    assert not is_loadable(files)


@pytest.mark.parametrize("name", ["v1-float16", "v1-lora", "v15-s2"])
def test_published_models_are_described_without_building_them(tmp_path, name):
    written = FIXTURES[name](tmp_path)
    files = open_folder(written.folder, written.base)
    assert is_loadable(files)
    assert inspect_checkpoint(files) == inspect_checkpoint(open_checkpoint(written.folder, base=written.base))


@pytest.mark.parametrize("layout", ["llava-hf", "awq-hf", "tinychat"])
def test_other_layouts_are_described_without_building_them(tmp_path, layout):
    model, processor = tiny.vila(tower="clip", hidden_size=64, intermediate_size=128)
    if layout != "llava-hf":
        use_int4(model, quantize_model(model, None, 32))
    save_model(model, processor, tmp_path / "m", layout)
    files = open_folder(tmp_path / "m")
    assert is_loadable(files)
    assert inspect_checkpoint(files) == inspect_checkpoint(open_checkpoint(tmp_path / "m"))
