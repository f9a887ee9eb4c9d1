"""TensorRT-LLM exports, compared with readers written from the format descriptions; TensorRT-LLM is not run."""

import re

import pytest
import torch

from tests.export.models import WIDE, random_search, rounded, write_model, write_search
from tests.export.readers.modelopt import read_hub_folder, read_ranks
from tests.export.readers.safetensors_file import read_file, read_folder
from vila.core.errors import LayoutError
from vila.core.reading import read_json
from vila.export.base import ExportOptions, write_export
from vila.export.source import open_source
from vila.quant.apply import apply_search


def expected(model, group, dtype=torch.float16):
    """The LLM's weights as they must come out, float32 by published names; group None for 16 bits."""
    out = {}
    for name, tensor in model.language_model.state_dict().items():
        is_linear = "layers." in name and name.endswith("_proj.weight")
        out[name] = rounded(tensor, group, True, dtype) if is_linear and group else tensor.to(dtype).float()
    return out


def check(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name] == tensor.numpy()).all(), name


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_llm_of_the_three_folders_is_quantized_bit_by_bit(tmp_path, family, dtype):
    model, processor = write_model(tmp_path / "m", family, dtype=dtype, tie_word_embeddings=False)
    search = write_search(tmp_path, model, 64, symmetric=True)
    write_export(open_source(tmp_path / "m", search=search), "tensorrt-llm", tmp_path / "out")
    apply_search(model, random_search(model, 64))
    half = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    check(read_hub_folder(tmp_path / "out" / "llm"), expected(model, 64, half))
    root = read_json(tmp_path / "out" / "config.json")
    assert [root[f"{name}_cfg"]["_name_or_path"] for name in ("llm", "vision_tower", "mm_projector")] == [
        "llm",
        "vision_tower",
        "mm_projector",
    ]
    assert root["model_dtype"] == str(half)
    # The loader draws a random projector without the first, and fails without the second.
    assert root["resume_path"]
    assert read_json(tmp_path / "out" / "llm" / "config.json")["model_max_length"] == 512
    assert root["llm_cfg"]["architectures"] == [type(model.language_model).__name__]
    assert "*vision_tower*" in read_json(tmp_path / "out" / "hf_quant_config.json")["quantization"]["exclude_modules"]


def test_tower_and_projector_of_the_three_folders_are_in_16_bits(tmp_path):
    model, _ = write_model(tmp_path / "m")
    write_export(open_source(tmp_path / "m"), "tensorrt-llm", tmp_path / "out", ExportOptions("16-bit"))
    assert not list((tmp_path / "out").rglob("hf_quant_config.json"))
    for folder, module, prefix in (
        ("vision_tower", model.vision_tower, "vision_model."),
        ("mm_projector", model.projector, "layers."),
    ):
        wanted = {f"{prefix}{name}": tensor.half().float() for name, tensor in module.state_dict().items()}
        found = {name: value.astype("f4") for name, value in read_folder(tmp_path / "out" / folder).items()}
        check(found, wanted)


def test_the_three_folders_in_16_bits_are_read_back_by_our_own_layout(tmp_path):
    from vila.model.loading import load_model

    model, _ = write_model(tmp_path / "m")
    write_export(open_source(tmp_path / "m"), "tensorrt-llm", tmp_path / "out", ExportOptions("16-bit"))
    again, processor = load_model(tmp_path / "out", dtype="float32")
    ids = torch.tensor([[5, 9, 77]])
    assert processor.template == "starter_qa"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", ["int4", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_joined_ranks_are_quantized_bit_by_bit(tmp_path, precision, ranks, tied):
    model, _ = write_model(tmp_path / "m", tie_word_embeddings=tied, **WIDE)
    search = write_search(tmp_path, model, 64, symmetric=True)
    options = ExportOptions(precision, tp_size=ranks)
    write_export(open_source(tmp_path / "m", search=search), "tensorrt-llm-legacy", tmp_path / "out", options)
    apply_search(model, random_search(model, 64))
    check(read_ranks(tmp_path / "out"), expected(model, 64 if precision == "int4" else None))


def test_a_rank_has_its_own_heads_and_part_of_the_padded_vocabulary(tmp_path):
    model, _ = write_model(tmp_path / "m", vocab_size=261, **WIDE)
    write_export(
        open_source(tmp_path / "m"), "tensorrt-llm-legacy", tmp_path / "out", ExportOptions("float16", tp_size=2)
    )
    second = read_file(tmp_path / "out" / "rank1.safetensors")
    attention = model.language_model.model.layers[0].self_attn
    # 4 heads and 2 key-value heads of 64: the second rank has the last two, and the last one.
    wanted = torch.cat([attention.q_proj.weight[128:], attention.k_proj.weight[64:], attention.v_proj.weight[64:]])
    assert (second["transformer.layers.0.attention.qkv.weight"] == wanted.detach().half().numpy()).all()
    assert second["lm_head.weight"].shape == (131, 256)
    assert (second["lm_head.weight"][-1] == 0).all()
    assert (second["lm_head.weight"][-2] == model.language_model.lm_head.weight[260].detach().half().numpy()).all()


def test_the_engine_commands_have_the_tokens_per_image_and_the_ranks(tmp_path):
    write_model(tmp_path / "m", **WIDE)
    options = ExportOptions("float16", tp_size=2)
    write_export(open_source(tmp_path / "m"), "tensorrt-llm-legacy", tmp_path / "vila-out", options)
    text = (tmp_path / "vila-out" / "README.md").read_text()
    for command in (
        "trtllm-build --checkpoint_dir vila-out",
        "--max_multimodal_len 4 --workers 2",
        "build_multimodal_engine.py --model_type vila",
        "mpirun -n 2 python examples/multimodal/run.py",
        "--use_fused_mlp=enable",
    ):
        assert command in text


@pytest.mark.parametrize(
    ("target", "options", "text", "value"),
    [
        ("tensorrt-llm", ExportOptions(group_size=32), {}, "group size 32.*--group-size 64"),
        (
            "tensorrt-llm-legacy",
            ExportOptions("float16", tp_size=3),
            WIDE,
            "3 ranks .*--tp-size 1 or 2",
        ),
        ("tensorrt-llm-legacy", ExportOptions(group_size=128, tp_size=2), WIDE, "2 ranks .*--tp-size 1"),
        ("tensorrt-llm", ExportOptions("16-bit", group_size=64), {}, "--group-size .*--precision int4"),
        ("tensorrt-llm-legacy", ExportOptions("float16", group_size=64), {}, "--group-size .*--precision int4"),
        ("tensorrt-llm-legacy", ExportOptions(group_size=64), {}, "--precision float16"),
        (
            "tensorrt-llm-legacy",
            ExportOptions("float16"),
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type 'dynamic'",
        ),
        ("tensorrt-llm-legacy", ExportOptions("float16"), {"attention_bias": True}, "8 weights"),
    ],
)
def test_unsupported_options_and_models_are_an_error_with_what_is_supported(tmp_path, target, options, text, value):
    write_model(tmp_path / "m", **text)
    with pytest.raises(LayoutError) as caught:
        write_export(open_source(tmp_path / "m"), target, tmp_path / "out", options)
    assert re.search(value, caught.value.problem)
    assert not (tmp_path / "out").exists()


def test_unsupported_towers_and_families_are_an_error(tmp_path):
    write_model(tmp_path / "d", tower="dinov2")
    with pytest.raises(LayoutError, match="dinov2"):
        write_export(open_source(tmp_path / "d"), "tensorrt-llm", tmp_path / "out", ExportOptions("16-bit"))
    write_model(tmp_path / "q", "qwen2")
    with pytest.raises(LayoutError, match="'qwen2'"):
        write_export(open_source(tmp_path / "q"), "tensorrt-llm-legacy", tmp_path / "out")
