"""AutoAWQ's layout: written for other readers, read from other writers, refused if it is inconsistent."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.model.layouts.int4_by_hand import awq, edit, logits, third_party
from tests.model.layouts.int4_reference import read_gemm, write_gemm, write_gemv, write_tinychat
from vila.core.errors import LayoutError, WeightMismatchError
from vila.kernels.int4 import quantize
from vila.model.int4_weights import int4_weights, use_int4
from vila.model.layouts.detect import detect_layout
from vila.model.loading import load_model, open_checkpoint, save_model
from vila.quant.apply import quantize_model

# siglip's last hidden state cannot be expressed by stock LLaVA.
NAMINGS = {"llava": "clip", "vila": "siglip"}
QUERY = "language_model.model.layers.0.self_attn.q_proj"


def quantized(family="llama", tower="clip", **text):
    model, processor = tiny.vila(family, tower=tower, **{"hidden_size": 64, "intermediate_size": 128, **text})
    use_int4(model, quantize_model(model, None, 32))
    return model, processor


def saved(folder, *arguments, **text):
    save_model(*quantized(*arguments, **text), folder, "awq-hf")
    return folder


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("naming", NAMINGS)
def test_an_independent_reader_gives_the_same_weights(tmp_path, family, naming):
    folder = saved(tmp_path / "model", family, NAMINGS[naming])
    assert json.loads((folder / "config.json").read_text())["model_type"] == naming
    tensors = load_file(folder / "model.safetensors")
    linears = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(linears) == 14
    assert not any(f"{name}.weight" in tensors for name in linears)
    plain, _ = tiny.vila(family, tower=NAMINGS[naming], hidden_size=64, intermediate_size=128)
    plain.half().float()
    for name in linears:
        parts = [tensors[f"{name}.{ending}"].numpy() for ending in ("qweight", "qzeros", "scales")]
        plain.get_submodule(name).weight.data = torch.from_numpy(read_gemm(*parts, 32))
    loaded, processor = load_model(folder, dtype="float32")
    assert len(int4_weights(loaded)) == 14
    inputs = processor(text="<image>What?", images=[tiny.image(0)], return_tensors="pt")
    # Rotary angles were not rounded to half precision in the file's model.
    fresh, _ = tiny.vila(family, tower=NAMINGS[naming], hidden_size=64, intermediate_size=128)
    fresh.load_state_dict(plain.state_dict())
    torch.testing.assert_close(loaded(**inputs).logits, fresh(**inputs).logits, rtol=0, atol=1e-5)
    assert torch.equal(logits(folder, int4=False), fresh(**inputs).logits[..., :259])


def test_the_words_are_those_of_the_format(tmp_path):
    model, processor = quantized()
    # Rows valued 0..7, over a range that makes codes of them.
    weight = quantize(torch.zeros(64, 64), 32)
    codes = (torch.arange(64) % 8).to(torch.uint8)
    weight.codes[:] = (codes | codes << 4)[:, None]
    weight.zeros[:] = codes[:, None]
    model.get_submodule(QUERY).codes = weight.codes
    model.get_submodule(QUERY).zeros = weight.zeros
    save_model(model, processor, tmp_path / "model", "awq-hf")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert {hex(word) for word in tensors[f"{QUERY}.qweight"].flatten().tolist()} == {"0x75316420"}
    assert {hex(word) for word in tensors[f"{QUERY}.qzeros"].flatten().tolist()} == {"0x75316420"}


@pytest.mark.parametrize("naming", NAMINGS)
def test_the_config_declares_packing_and_skipped_modules(tmp_path, naming):
    folder = saved(tmp_path / "model", "qwen2", NAMINGS[naming])
    facts = json.loads((folder / "config.json").read_text())
    skipped = facts["quantization_config"].pop("modules_to_not_convert")
    assert facts["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
    }
    both = {"lm_head", "vision_tower", "multi_modal_projector", "model.vision_tower", "model.multi_modal_projector"}
    assert set(skipped) == both | (set() if naming == "llava" else {"language_model.lm_head", "projector"})
    assert facts["dtype"] == "float16"
    kinds = {name: t.dtype for name, t in load_file(folder / "model.safetensors").items() if t.is_floating_point()}
    assert set(kinds.values()) == {torch.float16}
    assert f"{QUERY}.bias" in kinds


def test_a_linear_in_full_precision_is_listed_and_read_back(tmp_path):
    model, processor = tiny.vila(tower="clip", hidden_size=64, intermediate_size=128)
    weights = quantize_model(model, None, 32)
    del weights[QUERY]
    use_int4(model, weights)
    save_model(model, processor, tmp_path / "model", "awq-hf")
    facts = json.loads((tmp_path / "model" / "config.json").read_text())
    names = {QUERY, "model.language_model.layers.0.self_attn.q_proj"}
    assert names <= set(facts["quantization_config"]["modules_to_not_convert"])
    again, _ = load_model(tmp_path / "model")
    assert set(int4_weights(again)) == set(weights)


@pytest.mark.parametrize("naming", NAMINGS)
def test_saving_again_gives_the_same_bytes(tmp_path, naming):
    first = saved(tmp_path / "first", "qwen2", NAMINGS[naming])
    save_model(*load_model(first), tmp_path / "second", "awq-hf")
    save_model(*load_model(tmp_path / "second", dtype="float32"), tmp_path / "third", "awq-hf")
    assert (first / "model.safetensors").read_bytes() == (tmp_path / "second" / "model.safetensors").read_bytes()
    assert files(tmp_path / "second") == files(tmp_path / "third")


WRITERS = {"gemm": write_gemm, "gemv": write_gemv, "gemv_fast": write_tinychat}


@pytest.mark.parametrize("layout", ["native", "llava-hf", "llava-v1", "vila-v15"])
@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_third_party_checkpoints_load_in_every_naming(tmp_path, layout, version):
    folder, twin = third_party(tmp_path, layout, WRITERS[version])
    where = folder / "llm" if layout == "vila-v15" else folder
    edit(where / "config.json", quantization_config=awq(version))
    assert detect_layout(folder).name == "awq-hf"
    assert len(open_checkpoint(folder).int4) == 14
    torch.testing.assert_close(logits(folder), logits(twin), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_third_party_checkpoints_of_other_families_load(tmp_path, family):
    folder, twin = third_party(tmp_path, "llava-hf", write_gemm, family)
    edit(folder / "config.json", quantization_config=awq())
    torch.testing.assert_close(logits(folder), logits(twin), rtol=0, atol=1e-5)


def test_the_fast_packing_of_autoawq_loads(tmp_path):
    def write(*weight):
        parts = write_tinychat(*weight)
        parts["qzeros"] = parts.pop("scaled_zeros")
        return parts

    folder, twin = third_party(tmp_path, "llava-hf", write)
    edit(folder / "config.json", quantization_config=awq("gemv_fast"))
    torch.testing.assert_close(logits(folder), logits(twin), rtol=0, atol=1e-5)


def test_autoawqs_file_and_keys_are_read(tmp_path):
    folder, twin = third_party(tmp_path, "llava-v1", write_gemm)
    edit(folder / "quant_config.json", w_bit=4, q_group_size=32, zero_point=True, version="GEMM")
    assert detect_layout(folder).name == "awq-hf"
    torch.testing.assert_close(logits(folder), logits(twin), rtol=0, atol=1e-5)


def test_activations_in_another_type_leave_the_scales(tmp_path):
    folder = saved(tmp_path / "model")
    half, single = load_model(folder)[0], load_model(folder, dtype="bfloat16")[0]
    assert (half.dtype, single.dtype) == (torch.float16, torch.bfloat16)
    for model in (half, single):
        assert int4_weights(model)[QUERY].scales.dtype == torch.float16


def test_a_device_map_places_4_bit_layers(tmp_path):
    folder = saved(tmp_path / "model")
    assert torch.equal(logits(folder, device_map="auto"), logits(folder))


def test_the_config_in_memory_is_that_of_the_network_alone(tmp_path):
    model, processor = load_model(saved(tmp_path / "model", "llama", "siglip"), int4=False)
    assert not hasattr(model.config, "quantization_config")
    save_model(model, processor, tmp_path / "plain", "native")
    assert detect_layout(tmp_path / "plain").name == "native"


@pytest.mark.parametrize("layout", ["native", "llava-hf", "llava-v1", "vila-v15"])
def test_layouts_of_full_precision_refuse_a_model_in_4_bits(tmp_path, layout):
    with pytest.raises(LayoutError) as caught:
        save_model(*quantized(), tmp_path / "out", layout)
    assert "14" in caught.value.problem and caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_full_precision_is_refused(tmp_path):
    with pytest.raises(LayoutError) as caught:
        save_model(*tiny.vila(), tmp_path / "out", "awq-hf")
    assert "awq-hf" in caught.value.problem and caught.value.hint
    assert list(tmp_path.iterdir()) == []


class TestWrongDeclarations:
    @pytest.mark.parametrize(
        ("changes", "ending", "hint"),
        [
            ({"group_size": 64}, "qzeros", "gemm with group size 32"),
            ({"group_size": 48}, "qweight", "gemm with group size 32"),
            ({"group_size": 2**30}, "qweight", "gemm with group size 32"),
            ({"version": "gemv"}, "qzeros", "gemm with group size 32"),
            ({"version": "gemv_fast"}, "qweight", "gemm with group size 32"),
        ],
    )
    def test_packing_that_the_tensors_do_not_have(self, tmp_path, changes, ending, hint):
        folder = saved(tmp_path / "model")
        edit(folder / "config.json", quantization_config=awq(**changes))
        with pytest.raises(LayoutError) as caught:
            open_checkpoint(folder)
        assert caught.value.file == str(folder / "model.safetensors")
        assert caught.value.field.endswith(f"down_proj.{ending}")
        assert hint in caught.value.hint

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("bits", 8),
            ("bits", True),
            ("bits", None),
            ("zero_point", False),
            ("zero_point", 1),
            ("quant_method", "gptq"),
            ("quant_method", []),
            ("version", "marlin"),
            ("version", {}),
            ("group_size", -1),
            ("group_size", 1e30),
            ("group_size", "x"),
        ],
    )
    def test_a_value_that_is_not_read_is_named(self, tmp_path, field, value):
        folder = saved(tmp_path / "model")
        edit(folder / "config.json", quantization_config=awq(**{field: value}))
        with pytest.raises(LayoutError) as caught:
            open_checkpoint(folder)
        error = caught.value
        assert (error.file, error.field) == (str(folder / "config.json"), f"quantization_config.{field}")
        assert error.value == value
        assert error.expected

    @pytest.mark.parametrize("value", ["awq", [], 3, True])
    def test_not_an_object(self, tmp_path, value):
        folder = saved(tmp_path / "model")
        edit(folder / "config.json", quantization_config=value)
        with pytest.raises(LayoutError) as caught:
            open_checkpoint(folder)
        error = caught.value
        assert (error.file, error.field) == (str(folder / "config.json"), "quantization_config")
        assert error.value == value

    def test_no_weight_in_4_bits(self, tmp_path):
        save_model(*tiny.vila(tower="clip"), tmp_path / "model", "llava-hf")
        edit(tmp_path / "model" / "config.json", quantization_config=awq())
        with pytest.raises(LayoutError) as caught:
            open_checkpoint(tmp_path / "model")
        assert caught.value.file == str(tmp_path / "model")


class TestDamagedTensors:
    def change(self, folder, do):
        tensors = load_file(folder / "model.safetensors")
        do(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    @pytest.mark.parametrize("ending", ["qweight", "qzeros", "scales"])
    def test_one_is_missing(self, tmp_path, ending):
        folder = self.change(saved(tmp_path / "model"), lambda tensors: tensors.pop(f"{QUERY}.{ending}"))
        with pytest.raises(LayoutError) as caught:
            open_checkpoint(folder)
        assert (caught.value.file, caught.value.field) == (str(folder / "model.safetensors"), f"{QUERY}.{ending}")

    @pytest.mark.parametrize("ending", ["qweight", "qzeros", "scales"])
    @pytest.mark.parametrize(
        "damage",
        [
            lambda t: t.flatten()[0].clone(),
            lambda t: t.flatten().clone(),
            lambda t: t[..., None].clone(),
            lambda t: t[:0].clone(),
            lambda t: t[:, :0].clone(),
            lambda t: t[:-1].clone(),
            lambda t: t[:, :-1].contiguous(),
            lambda t: t.to(torch.int8),
            lambda t: t.to(torch.float64),
            lambda t: t.float() * torch.nan,
        ],
        ids=["scalar", "flat", "3d", "no rows", "no columns", "a row less", "a column less", "int8", "float64", "nan"],
    )
    def test_one_is_damaged(self, tmp_path, ending, damage):
        name = f"{QUERY}.{ending}"
        folder = self.change(saved(tmp_path / "model"), lambda tensors: tensors.update({name: damage(tensors[name])}))
        with pytest.raises(LayoutError) as caught:
            load_model(folder)
        assert caught.value.file == str(folder / "model.safetensors")
        assert caught.value.field.startswith(QUERY)

    def test_zeros_of_another_packing(self, tmp_path):
        def do(tensors):
            tensors[f"{QUERY}.scaled_zeros"] = tensors.pop(f"{QUERY}.qzeros")

        folder = self.change(saved(tmp_path / "model"), do)
        with pytest.raises(LayoutError) as caught:
            open_checkpoint(folder)
        assert caught.value.file == str(folder / "model.safetensors")

    def test_all_of_one_are_missing(self, tmp_path):
        def do(tensors):
            for ending in ("qweight", "qzeros", "scales"):
                del tensors[f"{QUERY}.{ending}"]

        folder = self.change(saved(tmp_path / "model"), do)
        with pytest.raises(WeightMismatchError) as caught:
            load_model(folder)
        assert (caught.value.missing, caught.value.unexpected, caught.value.mismatched) == ([f"{QUERY}.weight"], [], [])

    def test_one_is_of_another_shape(self, tmp_path):
        def do(tensors):
            for ending, (rows, columns) in {"qweight": (64, 4), "qzeros": (2, 4), "scales": (2, 32)}.items():
                tensors[f"{QUERY}.{ending}"] = tensors[f"{QUERY}.{ending}"][:rows, :columns].contiguous()

        folder = self.change(saved(tmp_path / "model"), do)
        with pytest.raises(WeightMismatchError) as caught:
            load_model(folder)
        assert f"{QUERY}.qweight" in caught.value.mismatched[0] and "(32, 64)" in caught.value.mismatched[0]

    def test_one_exists_in_both_forms(self, tmp_path):
        folder = self.change(saved(tmp_path / "model"), lambda t: t.update({f"{QUERY}.weight": torch.zeros(64, 64)}))
        with pytest.raises(WeightMismatchError) as caught:
            load_model(folder)
        assert caught.value.unexpected == [f"{QUERY}.weight"]

    def test_a_head_in_4_bits(self, tmp_path):
        def do(tensors):
            for ending in ("qweight", "qzeros", "scales"):
                tensors[f"language_model.lm_head.{ending}"] = tensors[f"{QUERY}.{ending}"].clone()

        folder = self.change(saved(tmp_path / "model"), do)
        with pytest.raises(LayoutError) as caught:
            open_checkpoint(folder)
        assert (caught.value.file, caught.value.field) == (str(folder), "language_model.lm_head")

    def test_the_file_is_cut(self, tmp_path):
        folder = saved(tmp_path / "model")
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(LayoutError) as caught:
            open_checkpoint(folder)
        assert caught.value.file == str(file)


def test_values_outside_float16_are_refused_and_nothing_is_written(tmp_path):
    model, processor = quantized()
    with torch.no_grad():
        model.projector[0].bias[0] = 1e6
    with pytest.raises(LayoutError) as caught:
        save_model(model, processor, tmp_path / "out", "awq-hf")
    assert caught.value.field == "multi_modal_projector.linear_1.bias"
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_on_a_base_in_4_bits_is_refused(tmp_path):
    folder = saved(tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    facts = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(folder)}
    edit(tmp_path / "adapter" / "adapter_config.json", **facts)
    with pytest.raises(LayoutError) as caught:
        open_checkpoint(tmp_path / "adapter")
    assert caught.value.file == str(folder) and "--model-base" in caught.value.hint


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="needs gptqmodel")
def test_stock_transformers_gives_the_same_logits(tmp_path):
    from transformers import LlavaForConditionalGeneration

    folder = saved(tmp_path / "model")
    stock = LlavaForConditionalGeneration.from_pretrained(folder, device_map="cpu")
    ours, _ = load_model(folder, dtype="float32")
    ids = torch.tensor([[5, 9, 11]])
    # Its kernels multiply in half precision.
    difference = stock(input_ids=ids).logits[..., :259].float() - ours(input_ids=ids).logits
    assert difference.abs().max() < 0.02
