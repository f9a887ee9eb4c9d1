"""Config files with wrong values: one error with file, field and value, before any module is built."""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import tiny
from tests.model.layouts.published import FIXTURES
from vila.core.errors import LayoutError, VilaError
from vila.model import loading
from vila.model.loading import empty_model, open_checkpoint, save_model

DELETED = object()
WRONG = (None, [], {}, "x", -1, 0, 1e30, True, float("nan"), 10**9, DELETED)


@dataclass(frozen=True)
class Written:
    root: Path
    folder: Path
    base: Path | None

    def open(self):
        return open_checkpoint(self.folder, base=self.base)

    def file(self, name):
        return self.root / name


def write(name, root):
    if name in FIXTURES:
        written = FIXTURES[name](root)
        return Written(root, written.folder, written.base)
    layout, tower, family = name.split()
    save_model(*tiny.vila(family, tower=tower), root / "checkpoint", layout)
    return Written(root, root / "checkpoint", None)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    made = {}

    def original(name):
        if name not in made:
            made[name] = write(name, tmp_path_factory.mktemp("original"))
        return made[name]

    return original


@pytest.fixture
def checkpoint(originals, tmp_path):
    """A copy of a checkpoint by its fixture's name, or by layout, tower and LLM family."""

    def copied(name):
        made = originals(name)
        shutil.copytree(made.root, tmp_path / "copy")
        inside = [path and tmp_path / "copy" / path.relative_to(made.root) for path in (made.folder, made.base)]
        return Written(tmp_path / "copy", *inside)

    return copied


def changed(content, path, value):
    """A JSON value with another one at a path of keys and indexes."""
    content = copy.deepcopy(content)
    at = content
    for key in path[:-1]:
        at = at.setdefault(key, {}) if isinstance(at, dict) else at[key]
    if value is DELETED:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return content


def change(file, field, value):
    file.write_text(json.dumps(changed(json.loads(file.read_text()), field.split("."), value)))


NATIVE, HF = "native dinov2 llama", "llava-hf clip llama"
V1_CONFIG, V1_TOWER, LLM = "checkpoint/config.json", "tower/config.json", "checkpoint/llm/config.json"
NATIVE_CONFIG, PROCESSOR = "checkpoint/config.json", "checkpoint/processor_config.json"
TOWER = "checkpoint/vision_tower/config.json"
REFUSED = [
    # Rotary position types that transformers lacks, and settings that a type needs.
    ("v1-mlp2x", V1_CONFIG, "rope_scaling", {"type": "su", "factor": 2.0}, "rope_scaling.type"),
    ("v1-mlp2x", V1_CONFIG, "rope_scaling", {"type": "linear"}, "rope_scaling.factor"),
    ("v1-mlp2x", V1_CONFIG, "rope_scaling", {"type": "dynamic", "factor": float("inf")}, "rope_scaling.factor"),
    ("v1-mlp2x", V1_CONFIG, "rope_scaling", {"type": ["linear"]}, "rope_scaling.type"),
    ("v1-mlp2x", V1_CONFIG, "rope_scaling", [2.0], "rope_scaling"),
    ("v1-mlp2x", V1_CONFIG, "rope_theta", "x", "rope_theta"),
    ("v1-stage-1", V1_CONFIG, "rope_scaling", {"type": "su"}, "rope_scaling.type"),
    ("v15-odd-grid", LLM, "rope_scaling", {"type": "su"}, "rope_scaling.type"),
    ("v15-odd-grid", LLM, "rope_scaling", {"rope_type": "yarn"}, "rope_scaling.factor"),
    (
        "v15-odd-grid",
        LLM,
        "rope_scaling",
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
        "rope_scaling.high_freq_factor",
    ),
    (
        NATIVE,
        NATIVE_CONFIG,
        "text_config.rope_parameters",
        {"rope_type": "su"},
        "text_config.rope_parameters.rope_type",
    ),
    (HF, NATIVE_CONFIG, "text_config.rope_parameters.rope_theta", {}, "text_config.rope_parameters.rope_theta"),
    # Parts of the model, and how they are joined.
    ("v1-mlp2x", V1_CONFIG, "mm_vision_tower", None, "mm_vision_tower"),
    ("v1-mlp2x", V1_CONFIG, "mm_vision_tower", ["tower", "tower"], "mm_vision_tower"),
    ("v1-mlp2x", V1_CONFIG, "mm_vision_tower", "nowhere", "mm_vision_tower"),
    ("v1-mlp2x", V1_CONFIG, "mm_projector_type", ["linear"], "mm_projector_type"),
    ("v1-mlp2x", V1_CONFIG, "mm_projector_type", "mlp1000000000x_gelu", "mm_projector_type"),
    ("v1-mlp2x", V1_CONFIG, "mm_vision_select_layer", 7, "mm_vision_select_layer"),
    ("v1-mlp2x", V1_CONFIG, "mm_vision_select_layer", "-2", "mm_vision_select_layer"),
    ("v1-mlp2x", V1_CONFIG, "mm_vision_select_feature", "cls", "mm_vision_select_feature"),
    ("v1-mlp2x", V1_CONFIG, "image_aspect_ratio", ["pad"], "image_aspect_ratio"),
    ("v1-mlp2x", V1_CONFIG, "mm_use_im_start_end", "yes", "mm_use_im_start_end"),
    ("v1-mlp2x", V1_CONFIG, "model_type", ["llava"], "model_type"),
    ("v1-mlp2x", V1_CONFIG, "model_type", "llava_mpt", "model_type"),
    ("v1-mlp2x", V1_TOWER, "model_type", "resnet", "model_type"),
    ("v15-odd-grid", V1_CONFIG, "mm_vision_select_feature", "patch", "mm_vision_select_feature"),
    ("v15-odd-grid", LLM, "model_type", "gpt_of_tomorrow", "model_type"),
    ("v15-odd-grid", LLM, "model_type", "clip_vision_model", "model_type"),
    ("v15-odd-grid", "checkpoint/mm_projector/config.json", "mm_projector_type", 2, "mm_projector_type"),
    ("v15-s2", V1_CONFIG, "s2_scales", [28, 56], "s2_scales"),
    ("v15-s2", V1_CONFIG, "s2_scales", "28,fifty", "s2_scales"),
    ("v15-s2", V1_CONFIG, "s2_max_split_size", 0, "s2_max_split_size"),
    ("v15-intern-vit", TOWER, "norm_type", "layer_norm", "norm_type"),
    ("v15-intern-vit", TOWER, "layer_norm_eps", 1e-5, "layer_norm_eps"),
    (NATIVE, NATIVE_CONFIG, "select_layer", 0, "select_layer"),
    (NATIVE, NATIVE_CONFIG, "vision_config.model_type", 3, "vision_config.model_type"),
    (NATIVE, NATIVE_CONFIG, "vision_config.use_swiglu_ffn", "x", "vision_config.use_swiglu_ffn"),
    (NATIVE, NATIVE_CONFIG, "text_config", [], "text_config"),
    (NATIVE, NATIVE_CONFIG, "vision_spec.image_mode", "stretch", "vision_spec.image_mode"),
    (NATIVE, NATIVE_CONFIG, "vision_spec.unknown", 1, "vision_spec.unknown"),
    (NATIVE, NATIVE_CONFIG, "vision_spec.tokens_per_image", 5, "tokens_per_image"),
    (NATIVE, PROCESSOR, "vision_spec.tokens_per_image", 5, "vision_spec.tokens_per_image"),
    (NATIVE, PROCESSOR, "vision_spec.image_size", 10**9, "vision_spec.image_size"),
    (NATIVE, PROCESSOR, "vision_spec.std", [0, 1, 1], "vision_spec.std"),
    (NATIVE, PROCESSOR, "vision_spec.num_video_frames", 10**9, "vision_spec.num_video_frames"),
    (NATIVE, PROCESSOR, "image_token_id", 3, "image_token_id"),
    (HF, NATIVE_CONFIG, "vision_feature_layer", [-2, -1], "vision_feature_layer"),
    (HF, NATIVE_CONFIG, "vila.vocab_size", -5, "vila.vocab_size"),
    (HF, "checkpoint/preprocessor_config.json", "image_mean", [0.5], "image_mean"),
    (HF, "checkpoint/preprocessor_config.json", "crop_size.height", 10**9, "crop_size.height"),
    # Numbers of the LLM and the tower.
    ("v1-mlp2x", V1_CONFIG, "rms_norm_eps", -1, "rms_norm_eps"),
    ("v1-mlp2x", V1_CONFIG, "rms_norm_eps", float("nan"), "rms_norm_eps"),
    ("v1-mlp2x", V1_CONFIG, "hidden_act", "relu9", "hidden_act"),
    ("v1-mlp2x", V1_CONFIG, "max_position_embeddings", 10**12, "max_position_embeddings"),
    ("v1-mlp2x", V1_CONFIG, "num_attention_heads", 5, "num_attention_heads"),
    ("v1-mlp2x", V1_CONFIG, "num_attention_heads", True, "num_attention_heads"),
    ("v1-mlp2x", V1_CONFIG, "pad_token_id", 1200, "pad_token_id"),
    ("v1-mlp2x", V1_CONFIG, "torch_dtype", "int8", "torch_dtype"),
    ("v1-mlp2x", V1_TOWER, "image_size", [56, 42], "image_size"),
    ("v1-mlp2x", V1_TOWER, "patch_size", 0, "patch_size"),
    ("v1-mlp2x", V1_TOWER, "num_channels", 4, "num_channels"),
    ("native siglip qwen2", NATIVE_CONFIG, "text_config.layer_types", [3], "text_config.layer_types"),
    # Generation and tokenizer.
    (NATIVE, "checkpoint/generation_config.json", "eos_token_id", [], "eos_token_id"),
    (NATIVE, "checkpoint/generation_config.json", "eos_token_id", "2", "eos_token_id"),
    (NATIVE, "checkpoint/generation_config.json", "temperature", float("nan"), "temperature"),
    (NATIVE, "checkpoint/generation_config.json", "max_length", {}, "max_length"),
    (NATIVE, "checkpoint/tokenizer_config.json", "eos_token", 5, "eos_token"),
    (NATIVE, "checkpoint/tokenizer_config.json", "padding_side", "top", "padding_side"),
    (NATIVE, "checkpoint/tokenizer_config.json", "tokenizer_class", ["x"], "tokenizer_class"),
    ("v15-odd-grid", "checkpoint/llm/tokenizer_config.json", "add_bos_token", "yes", "add_bos_token"),
    ("v15-odd-grid", "checkpoint/llm/special_tokens_map.json", "eos_token", 5, "eos_token"),
    (NATIVE, "checkpoint/tokenizer.json", "model.vocab", [], None),
    (NATIVE, "checkpoint/tokenizer.json", "decoder.type", "x", None),
]


@pytest.mark.parametrize(("name", "file", "key", "value", "field"), REFUSED)
def test_a_wrong_value_is_refused_with_file_and_field(checkpoint, name, file, key, value, field):
    written = checkpoint(name)
    change(written.file(file), key, value)
    with pytest.raises(LayoutError) as caught:
        empty_model(written.open())
    error = caught.value
    assert error.file == str(written.file(file))
    assert error.field == field
    if field == key:
        assert error.value is value or error.value == value or value != value


SIZES = [
    ("v1-mlp2x", V1_CONFIG, "num_hidden_layers", 200_000, "2,"),
    ("v1-mlp2x", V1_CONFIG, "num_hidden_layers", 3, "2,"),
    ("v1-mlp2x", V1_CONFIG, "num_hidden_layers", DELETED, "2,"),
    ("v1-mlp2x", V1_CONFIG, "vocab_size", 2**31 - 1, "1,200,"),
    ("v1-mlp2x", V1_CONFIG, "hidden_size", 2**30, "64,"),
    ("v1-mlp2x", V1_CONFIG, "intermediate_size", 2**31 - 1, "96,"),
    ("v1-mlp2x", V1_CONFIG, "num_key_value_heads", 4, "2,"),
    ("v1-mlp2x", V1_CONFIG, "head_dim", 2**30, None),
    ("v1-mlp2x", V1_TOWER, "num_hidden_layers", 200_000, "3,"),
    ("v1-mlp2x", V1_TOWER, "image_size", 2**30, "56,"),
    ("v1-mlp2x", V1_TOWER, "patch_size", 1, "14,"),
    ("v1-mlp2x", V1_TOWER, "hidden_size", 2**30, "32,"),
    ("v1-mlp2x", V1_TOWER, "intermediate_size", 2**31 - 1, "64,"),
    ("v15-odd-grid", LLM, "num_hidden_layers", 200_000, "2,"),
    ("v15-odd-grid", TOWER, "image_size", 2**30, "70,"),
    ("v15-intern-vit", TOWER, "image_size", 2**30, "56,"),
    ("v15-intern-vit", TOWER, "num_hidden_layers", 200_000, "3,"),
    (NATIVE, NATIVE_CONFIG, "text_config.num_hidden_layers", 200_000, "2,"),
    ("native siglip qwen2", NATIVE_CONFIG, "text_config.vocab_size", 2**31 - 1, "259,"),
    (NATIVE, NATIVE_CONFIG, "vision_config.mlp_ratio", 2**30, "4,"),
    (NATIVE, NATIVE_CONFIG, "vision_config.image_size", 14 * 2**20, "28,"),
    (HF, NATIVE_CONFIG, "vision_config.num_hidden_layers", 200_000, "4,"),
]


@pytest.mark.parametrize(("name", "file", "key", "value", "expected"), SIZES)
def test_sizes_that_the_weights_do_not_have_are_refused_before_a_module_is_built(
    checkpoint, monkeypatch, name, file, key, value, expected
):
    def built(*_):
        raise AssertionError("a module was built")

    written = checkpoint(name)
    change(written.file(file), key, value)
    monkeypatch.setattr(loading, "VilaForConditionalGeneration", built)
    with pytest.raises(LayoutError) as caught:
        written.open()
    error = caught.value
    assert error.file == str(written.file(file))
    if expected is not None:
        assert error.field == key
        assert error.value == (value if value is not DELETED else 32)
        assert error.expected.startswith(expected)


def test_layers_of_a_part_without_weights_are_bounded(checkpoint):
    written = checkpoint("v15-odd-grid")
    (written.folder / "llm" / "model.safetensors").write_bytes(
        (written.folder / "mm_projector" / "model.safetensors").read_bytes()
    )
    change(written.file(LLM), "num_hidden_layers", 200_000)
    with pytest.raises(LayoutError) as caught:
        written.open()
    assert (caught.value.field, caught.value.value) == ("num_hidden_layers", 200_000)


@pytest.mark.parametrize("size", [10**9, 10**30])
def test_an_enormous_number_of_layers_is_refused(checkpoint, size):
    written = checkpoint("native siglip qwen2")
    change(written.file(NATIVE_CONFIG), "text_config.num_hidden_layers", size)
    with pytest.raises(LayoutError) as caught:
        written.open()
    assert (caught.value.field, caught.value.value) == ("text_config.num_hidden_layers", size)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234567\n"
SMALL = [
    *((NATIVE, f"checkpoint/{name}") for name in ("config.json", "processor_config.json", "generation_config.json")),
    *((NATIVE, f"checkpoint/{name}") for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")),
    (HF, "checkpoint/preprocessor_config.json"),
    ("v1-mlp2x", V1_CONFIG),
    ("v1-mlp2x", "checkpoint/tokenizer.model"),
    ("v1-mlp2x", V1_TOWER),
    ("v1-mlp2x", "tower/preprocessor_config.json"),
    ("v1-stage-1", "base/tokenizer.model"),
    ("v15-odd-grid", LLM),
    ("v15-odd-grid", "checkpoint/mm_projector/config.json"),
    ("v15-odd-grid", "checkpoint/llm/special_tokens_map.json"),
]


@pytest.mark.parametrize(("name", "file"), SMALL)
@pytest.mark.parametrize(
    ("content", "hint"),
    [(POINTER, "git lfs pull"), (b"", "copy"), (b"\xff\xfe{\0}\0", "UTF-8"), (b"<!DOCTYPE html>", "download")],
)
def test_foreign_content_in_a_config_file_is_named(checkpoint, name, file, content, hint):
    written = checkpoint(name)
    written.file(file).write_bytes(content)
    with pytest.raises(LayoutError) as caught:
        written.open()
    assert caught.value.file == str(written.file(file))
    assert hint in caught.value.hint or (content == b"" and "JSON" in caught.value.problem)


@pytest.mark.parametrize("file", [file for name, file in SMALL if name == NATIVE and file.endswith(".json")])
@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b'{"a":', b"[" * 100_000, b'{"a": "\xff"}'])
def test_a_file_that_is_not_a_json_object_is_named(checkpoint, file, content):
    written = checkpoint(NATIVE)
    written.file(file).write_bytes(content)
    with pytest.raises(LayoutError) as caught:
        written.open()
    assert caught.value.file == str(written.file(file))


def small_files(written):
    return sorted(p for p in written.root.rglob("*.json") if not p.name.endswith(".index.json"))


def paths(content, above=()):
    """Every path of keys, but for those of vocabularies."""
    if isinstance(content, dict) and (len(content) <= 60 or not above):
        for key in content:
            yield (*above, key)
            yield from paths(content[key], (*above, key))
    elif isinstance(content, list) and 0 < len(content) < 4:
        for place in range(len(content)):
            yield (*above, place)
            yield from paths(content[place], (*above, place))


def attempt(written):
    """Opens a checkpoint as `vila info` does; what is not an error of ours with a file's name is raised."""
    try:
        empty_model(written.open())
    except VilaError as error:
        assert error.file is not None or written.root.as_posix() in str(error), error


LAYOUTS = (NATIVE, HF, "native siglip qwen2", "v1-mlp2x", "v1-stage-1", "v15-odd-grid", "v15-intern-vit")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_wrong_value_at_some_keys_is_read_or_refused_by_name(checkpoint, name):
    written, number = checkpoint(name), 0
    for file in small_files(written):
        kept = file.read_text()
        content = json.loads(kept)
        for path in paths(content) if file.name != "tokenizer.json" else ():
            number += 1
            if number % 3 == 0:  # all of them take seconds, see the next test
                file.write_text(json.dumps(changed(content, path, WRONG[number // 3 % len(WRONG)])))
                attempt(written)
        file.write_text(kept)


@pytest.mark.slow
@pytest.mark.parametrize("name", (*LAYOUTS, "native clip mistral", "v1-tower-inside", "v15-s2", "v15-clip"))
def test_every_wrong_value_at_every_key_is_read_or_refused_by_name(checkpoint, name):
    written = checkpoint(name)
    for file in small_files(written):
        kept = file.read_text()
        content = json.loads(kept)
        for path in paths(content):
            for value in WRONG:
                file.write_text(json.dumps(changed(content, path, value)))
                attempt(written)
        file.write_text(kept)
