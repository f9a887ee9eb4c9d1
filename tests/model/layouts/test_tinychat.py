"""TinyChat's files: both packings, alone or in a directory, in one file or several; values round-trip."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.model.layouts.int4_by_hand import edit, is_block_linear, logits, model_folder, packed, third_party
from tests.model.layouts.int4_reference import write_gemm, write_gemv, write_tinychat
from tests.model.layouts.test_awq import files, quantized
from vila.core.errors import MISSING, LayoutError, WeightMismatchError
from vila.kernels.int4 import dequantize
from vila.model.int4_weights import int4_weights
from vila.model.layouts.detect import detect_layout
from vila.model.loading import load_model, open_checkpoint, save_model

NAME = "tiny-w4-g32-awq-v2.pt"
QUERY = "language_model.model.layers.0.self_attn.q_proj"


def by_hand(root, layout, write=write_tinychat, family="llama", name=NAME):
    """A 16-bit model, a file of 4-bit weights next to it, and their full-precision twin."""
    base = model_folder(root / "base" / "model", layout, family)
    twin = root / "twin" / "model"
    shutil.copytree(base, twin)
    inner = "llm" if layout == "vila-v15" else "."
    small, large = packed(load_file(base / inner / "model.safetensors"), write)
    torch.save(small, root / name)
    torch.save(large, twin / inner / "pytorch_model.bin")
    (twin / inner / "model.safetensors").unlink()
    return base, root / name, twin


@pytest.mark.parametrize("layout", ["llava-v1", "vila-v15"])
@pytest.mark.parametrize("write", [write_tinychat, write_gemv])
def test_a_file_next_to_the_16_bit_model_loads(tmp_path, layout, write):
    base, file, twin = by_hand(tmp_path, layout, write)
    assert detect_layout(file).name == "tinychat"
    torch.testing.assert_close(logits(file, base=base), logits(twin), rtol=0, atol=1e-5)
    # Of the 16-bit model's LLM nothing is taken, whatever else is.
    assert (logits(file, base=base) - logits(base)).abs().max() > 0.05


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_other_families_load(tmp_path, family):
    base, file, twin = by_hand(tmp_path, "llava-v1", family=family)
    torch.testing.assert_close(logits(file, base=base), logits(twin), rtol=0, atol=1e-5)


@pytest.mark.parametrize("inside", ["", "llm"])
def test_a_file_in_the_directory_of_its_model_needs_no_base(tmp_path, inside):
    base, file, twin = by_hand(tmp_path, "vila-v15" if inside else "llava-v1")
    file.rename(base / inside / NAME)
    expected = logits(twin)
    torch.testing.assert_close(logits(base / inside / NAME), expected, rtol=0, atol=1e-5)
    # With its 16-bit weights there, the directory is a 16-bit model; without them, the file is its weights.
    assert detect_layout(base).name != "tinychat"
    (base / inside / "model.safetensors").unlink()
    assert detect_layout(base).name == "tinychat"
    torch.testing.assert_close(logits(base), expected, rtol=0, atol=1e-5)


def test_the_llm_folder_alone_finds_its_model(tmp_path):
    base, file, twin = by_hand(tmp_path, "vila-v15")
    file.rename(base / "llm" / NAME)
    (base / "llm" / "model.safetensors").unlink()
    torch.testing.assert_close(logits(base / "llm"), logits(twin), rtol=0, atol=1e-5)


def test_a_file_for_each_tensor_loads(tmp_path):
    base, file, twin = by_hand(tmp_path, "llava-v1")
    (tmp_path / "split").mkdir()
    for name, tensor in torch.load(file, weights_only=True).items():
        torch.save({name: tensor}, tmp_path / "split" / f"{name}.pt")
    torch.testing.assert_close(logits(tmp_path / "split", base=base), logits(twin), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("tower", "inner"), [("clip", "."), ("siglip", "llm")])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_written_is_read_back(tmp_path, tower, inner, family):
    model, processor = quantized(family, tower)
    folder = tmp_path / "model"
    save_model(model, processor, folder, "tinychat")
    assert [path.name for path in folder.rglob("*.pt")] == ["model-w4-g32-awq-v2.pt"]
    assert (folder / inner / "model-w4-g32-awq-v2.pt").is_file()
    assert detect_layout(folder).name == "tinychat"
    again, _ = load_model(folder)
    assert again.dtype == torch.float16
    for name, weight in int4_weights(model).items():
        assert all(
            torch.equal(getattr(weight, part), getattr(int4_weights(again)[name], part))
            for part in ("codes", "scales", "zeros")
        )
    plain = {name: t for name, t in model.half().state_dict().items() if "codes" not in name and "zeros" not in name}
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.items() if not name.endswith("inv_freq"))


def test_the_file_has_the_published_format(tmp_path):
    model, processor = quantized("qwen2")
    save_model(model, processor, tmp_path / "model", "tinychat")
    held = torch.load(tmp_path / "model" / "model-w4-g32-awq-v2.pt", weights_only=True)
    weight = int4_weights(model)[QUERY]
    codes = (weight.codes[:, :, None] >> torch.tensor([0, 4], dtype=torch.uint8) & 15).flatten(1)
    expected = write_tinychat(codes.numpy(), weight.zeros.numpy(), weight.scales.numpy())
    stem = "model.layers.0.self_attn.q_proj"
    for ending, array in expected.items():
        assert torch.equal(held[f"{stem}.{ending}"], torch.from_numpy(array))
    assert held[f"{stem}.bias"].dtype == held["lm_head.weight"].dtype == torch.float16
    assert not any(is_block_linear(name) for name in held)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "float16"


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_tied_head_is_in_the_file(tmp_path, tower):
    """TinyChat does not tie weights, and needs every key of the LLM in the file."""
    model, processor = quantized("llama", tower)
    assert model.config.text_config.tie_word_embeddings
    save_model(model, processor, tmp_path / "model", "tinychat")
    (path,) = (tmp_path / "model").rglob("*.pt")
    held = torch.load(path, weights_only=True)
    assert torch.equal(held["lm_head.weight"], held["model.embed_tokens.weight"])


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_saving_again_gives_the_same_bytes(tmp_path, tower):
    folders = [tmp_path / str(n) / "model" for n in range(3)]
    save_model(*quantized("llama", tower), folders[0], "tinychat")
    save_model(*load_model(folders[0]), folders[1], "tinychat")
    save_model(*load_model(folders[1], dtype="float32"), folders[2], "tinychat")
    weights = [{name: held for name, held in files(folder).items() if ".json" not in name} for folder in folders]
    assert weights[0] == weights[1]
    assert files(folders[1]) == files(folders[2])


def test_conversion_between_4_bit_layouts_is_lossless(tmp_path):
    folder, _ = third_party(tmp_path, "llava-v1", write_gemm)
    edit(folder / "quant_config.json", w_bit=4, q_group_size=32, zero_point=True, version="GEMM")
    save_model(*load_model(folder), tmp_path / "a", "tinychat")
    save_model(*load_model(tmp_path / "a"), tmp_path / "b", "awq-hf")
    first, last = load_model(folder)[0], load_model(tmp_path / "b")[0]
    for name, weight in int4_weights(first).items():
        assert torch.equal(dequantize(weight), dequantize(int4_weights(last)[name]))
    assert torch.equal(logits(tmp_path / "a"), logits(tmp_path / "b"))


class TestRefusals:
    def test_a_file_without_its_model(self, tmp_path):
        _, file, _ = by_hand(tmp_path, "llava-v1")
        with pytest.raises(LayoutError) as caught:
            open_checkpoint(file)
        assert caught.value.file == str(file) and "--model-base" in caught.value.hint

    @pytest.mark.parametrize(
        ("content", "field", "value"),
        [
            ({"scale": [], "clip": []}, None, MISSING),
            ({"model": {"a": torch.ones(1)}}, "model", "dict"),
            ({"a": None}, "a", "NoneType"),
            ({3: torch.ones(1)}, "3", "StoredTensor"),
            ([torch.ones(1)], None, "list"),
            ({"a": torch.nn.Linear(1, 1)}, None, "torch.nn.modules.linear.Linear"),
        ],
    )
    def test_a_pickle_of_something_else(self, tmp_path, content, field, value):
        base = model_folder(tmp_path / "base", "llava-v1")
        torch.save(content, tmp_path / "x-v2.pt")
        with pytest.raises(LayoutError) as caught:
            open_checkpoint(tmp_path / "x-v2.pt", base=base)
        assert (caught.value.file, caught.value.field, caught.value.value) == (str(tmp_path / "x-v2.pt"), field, value)

    @pytest.mark.parametrize("content", [b"", b"hello", b"not a file of torch", b"PK\x03\x04 cut"])
    def test_not_a_torch_file(self, tmp_path, content):
        base = model_folder(tmp_path / "base", "llava-v1")
        (tmp_path / "x-v2.pt").write_bytes(content)
        with pytest.raises(LayoutError) as caught:
            open_checkpoint(tmp_path / "x-v2.pt", base=base)
        assert caught.value.file == str(tmp_path / "x-v2.pt")

    def test_weights_in_full_precision(self, tmp_path):
        base = model_folder(tmp_path / "base", "llava-v1")
        torch.save(load_file(base / "model.safetensors"), tmp_path / "x-v2.pt")
        with pytest.raises(LayoutError) as caught:
            open_checkpoint(tmp_path / "x-v2.pt", base=base)
        assert caught.value.file == str(tmp_path / "x-v2.pt")

    def test_weights_of_another_model(self, tmp_path):
        _, file, _ = by_hand(tmp_path, "llava-v1")
        other = tmp_path / "other"
        save_model(*tiny.vila(tower="clip", hidden_size=128, intermediate_size=128), other, "llava-v1")
        with pytest.raises(LayoutError) as caught:
            load_model(file, base=other)
        error = caught.value
        assert (error.file, error.field, error.value) == (str(other / "config.json"), "hidden_size", 128)
        assert error.expected.startswith("64,")

    def test_an_incomplete_llm(self, tmp_path):
        base, file, _ = by_hand(tmp_path, "llava-v1")
        held = torch.load(file, weights_only=True)
        del held["model.norm.weight"], held["model.layers.1.mlp.up_proj.scales"]
        torch.save(held, file)
        with pytest.raises(LayoutError) as caught:
            open_checkpoint(file, base=base)
        missing = "language_model.model.layers.1.mlp.up_proj.scales"
        assert (caught.value.file, caught.value.field) == (str(file), missing)
        for name in [name for name in held if "layers.1.mlp.up_proj" in name]:
            del held[name]
        torch.save(held, file)
        # The 16-bit model has both, but they do not belong to these weights.
        with pytest.raises(WeightMismatchError) as caught:
            load_model(file, base=base)
        assert [name.removeprefix("language_model.model.") for name in caught.value.missing] == [
            "layers.1.mlp.up_proj.weight",
            "norm.weight",
        ]

    @pytest.mark.parametrize("ending", ["qweight", "scales", "scaled_zeros"])
    @pytest.mark.parametrize(
        "damage",
        [
            lambda t: torch.ones(5, 5),
            lambda t: t.flatten()[0].clone(),
            lambda t: t.flatten().clone(),
            lambda t: t[:0].clone(),
            lambda t: t[:-1].clone(),
            lambda t: t.to(torch.int8),
            lambda t: t.float() * torch.nan,
        ],
        ids=["5x5", "scalar", "flat", "no rows", "a row less", "int8", "nan"],
    )
    def test_an_unknown_packing(self, tmp_path, ending, damage):
        base, file, _ = by_hand(tmp_path, "llava-v1")
        held = torch.load(file, weights_only=True)
        name = f"model.layers.0.mlp.up_proj.{ending}"
        held[name] = damage(held[name])
        torch.save(held, file)
        with pytest.raises(LayoutError) as caught:
            load_model(file, base=base)
        assert caught.value.file == str(file)
        assert "layers.0.mlp.up_proj" in caught.value.field

    def test_several_files(self, tmp_path):
        base, file, _ = by_hand(tmp_path, "llava-v1")
        (base / "model.safetensors").unlink()
        for name in ("a-w4-g32-awq-v2.pt", "b-w4-g32-awq-v2.pt"):
            shutil.copy(file, base / name)
        with pytest.raises(LayoutError) as caught:
            open_checkpoint(base)
        assert (caught.value.file, caught.value.value) == (str(base), ["a-w4-g32-awq-v2.pt", "b-w4-g32-awq-v2.pt"])

    def test_a_model_in_full_precision(self, tmp_path):
        with pytest.raises(LayoutError) as caught:
            save_model(*tiny.vila(tower="clip"), tmp_path / "out", "tinychat")
        assert "tinychat" in caught.value.problem and caught.value.hint

    def test_sizes_that_the_packing_does_not_support(self, tmp_path):
        model, processor = quantized("llama", "clip", intermediate_size=96)
        with pytest.raises(LayoutError) as caught:
            save_model(model, processor, tmp_path / "out", "tinychat")
        assert "0.mlp.down_proj" in caught.value.field and caught.value.value == 96
        assert list(tmp_path.iterdir()) == []

    def test_a_tower_that_neither_layout_supports(self, tmp_path):
        with pytest.raises(LayoutError) as caught:
            save_model(*quantized("llama", "dinov2"), tmp_path / "out", "tinychat")
        assert (caught.value.field, caught.value.value) == ("vision_config.model_type", "dinov2")
