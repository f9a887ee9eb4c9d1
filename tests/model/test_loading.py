"""Loading a checkpoint: errors name file and field, and no checkpoint is loaded partially."""

import gc
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from vila.core.errors import ConfigError, LayoutError, MediaError, TemplateError
from vila.core.types import Image
from vila.model.feature_cache import FeatureCache
from vila.model.loading import load_model, save_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(*tiny.vila(), folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    target = tmp_path / "copy"
    target.mkdir()
    for file in saved.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_model_loads_in_the_requested_dtype(saved):
    assert load_model(saved)[0].dtype == torch.float32
    assert load_model(saved, dtype="bfloat16")[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "make",
    [lambda path: None, lambda path: path.write_text("x"), lambda path: path.mkdir()],
    ids=["nothing", "a file", "an empty directory"],
)
def test_a_path_that_is_not_a_model_is_named(tmp_path, make):
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(LayoutError) as caught:
        load_model(path)
    assert caught.value.file == str(path)


@pytest.mark.parametrize(
    ("models", "hint"),
    [(["3_sft", "1_align"], "3_sft/model or {path}/1_align/model"), ([""], "model"), ([], None)],
)
def test_a_directory_of_runs_suggests_the_models_in_it(saved, tmp_path, models, hint):
    path = tmp_path / "starter"
    path.mkdir()
    for name in models:
        (path / name).mkdir(exist_ok=True)
        (path / name / "model").symlink_to(saved)
    with pytest.raises(LayoutError) as caught:
        load_model(path)
    assert caught.value.file == str(path)
    assert caught.value.hint == (hint and f"did you mean {path}/{hint.format(path=path)}?")


def mapped(path):
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_weights_are_the_mapped_file_unless_they_are_cast(copy):
    file = copy / "model.safetensors"
    model, _ = load_model(copy)
    assert mapped(file)
    before = load_file(file)
    with torch.no_grad():
        model.projector[0].bias.add_(1)
    after = load_file(file)
    assert all(torch.equal(before[name], after[name]) for name in before)  # a private mapping: the file never changes
    del model, before, after
    gc.collect()
    assert not mapped(file)
    cast, _ = load_model(copy, dtype="bfloat16")
    assert not mapped(file)
    assert cast.dtype == torch.bfloat16


def test_a_tied_head_is_one_tensor(copy):
    model, _ = load_model(copy)
    assert model.language_model.lm_head.weight is model.get_input_embeddings().weight
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]


def test_an_unknown_dtype_is_refused(saved):
    with pytest.raises(ConfigError) as caught:
        load_model(saved, dtype="int8")
    assert (caught.value.field, caught.value.value) == ("dtype", "int8")


def test_a_device_map_spreads_the_model_with_accelerate(saved):
    model, processor = load_model(saved, device_map="auto")
    plain, _ = load_model(saved)
    inputs = processor(text="<image>What?", images=[tiny.image(0)], return_tensors="pt")
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


def test_missing_and_unexpected_weights_are_all_listed(copy):
    weights = load_file(copy / "model.safetensors")
    weights["projector.9.weight"] = weights.pop("projector.0.weight")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LayoutError) as caught:
        load_model(copy)
    assert (caught.value.missing, caught.value.unexpected) == (["projector.0.weight"], ["projector.9.weight"])


def test_a_wrong_shape_is_named_with_both_shapes(copy):
    weights = load_file(copy / "model.safetensors")
    weights["projector.0.bias"] = torch.zeros(7)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LayoutError) as caught:
        load_model(copy)
    (mismatched,) = caught.value.mismatched
    assert all(text in mismatched for text in ("projector.0.bias", "model.safetensors", "(7,)", "(32,)"))


def test_a_truncated_weight_file_is_named(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LayoutError) as caught:
        load_model(copy)
    assert caught.value.file == str(file)


def test_a_tokenizer_of_another_model_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "image_token_id": 12}))
    with pytest.raises(LayoutError) as caught:
        load_model(copy)
    error = caught.value
    assert (error.file, error.field) == (str(copy / "processor_config.json"), "image_token_id")
    assert error.value == 259


def test_different_numbers_of_markers_and_images_are_an_error():
    _, processor = tiny.vila()
    with pytest.raises(MediaError) as caught:
        processor(text="<image> and <image>", images=[tiny.image(1)])
    assert (caught.value.field, caught.value.value, caught.value.expected) == ("images", 1, "2")


def test_a_model_without_a_template_names_the_option():
    _, processor = tiny.vila(template="")
    with pytest.raises(TemplateError) as caught:
        processor.find_template()
    assert caught.value.field == "template" and "--template" in caught.value.hint


def test_features_are_computed_once_and_survive_the_process(tmp_path):
    model, processor = tiny.vila()
    images = [tiny.image(n) for n in range(5)]
    first = FeatureCache(tmp_path, model, processor)(images)
    assert torch.allclose(first, model.vision_features(processor.pixels(images)), atol=1e-5)
    model.vision_features = None  # a second reader must not compute
    again = FeatureCache(tmp_path, model, processor)
    assert torch.equal(again([images[3], images[0]]), first[[3, 0]])


def test_another_tower_never_reads_the_features_of_this_one(tmp_path):
    one, processor = tiny.vila(seed=0)
    two, _ = tiny.vila(seed=1)
    image = [tiny.image(0)]
    assert not torch.equal(FeatureCache(tmp_path, one, processor)(image), FeatureCache(tmp_path, two, processor)(image))


def test_a_damaged_cache_file_is_deleted_and_computed_again(tmp_path):
    model, processor = tiny.vila()
    image = [tiny.image(0)]
    cache = FeatureCache(tmp_path, model, processor)
    first = cache(image)
    file = next(cache.folder.glob("*.safetensors"))
    whole = file.read_bytes()
    flips = [whole[:n] + bytes([whole[n] ^ 64]) + whole[n + 1 :] for n in range(0, len(whole), len(whole) // 12)]
    for damaged in (bytes(30), b"", b"version https://git-lfs.github.com/spec/v1", whole[:-5], *flips):
        file.write_bytes(damaged)
        assert torch.equal(FeatureCache(tmp_path, model, processor)(image), first)
        assert file.read_bytes() == whole


def test_an_invalid_image_is_an_error_before_the_tower_runs(tmp_path):
    _, processor = tiny.vila()
    with pytest.raises(MediaError) as caught:
        processor.pixels([Image(b"<!DOCTYPE html>")])
    assert caught.value.problem
