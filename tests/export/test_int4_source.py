"""INT4 models keep their codes in formats that can store them; other formats have an error."""

import pytest
import torch

from tests.export.models import WIDE, write_model, write_search
from tests.export.readers.modelopt import read_hub_folder, read_ranks
from tests.export.readers.pack_quantized import read_weights
from vila.core.errors import LayoutError
from vila.export.base import ExportOptions, write_export
from vila.export.source import open_source
from vila.kernels.int4 import dequantize
from vila.model.int4_weights import use_int4
from vila.model.loading import save_model
from vila.quant.apply import quantize_model


def write_int4(folder, group=64, symmetric=False, **text):
    """An awq-hf directory; the values of its weights by the names of the LLM."""
    model, processor = write_model(folder / "full", **text)
    weights = quantize_model(model, None, group, symmetric)
    use_int4(model, weights)
    save_model(model, processor, folder / "m", layout="awq-hf")
    return {f"{name}.weight".removeprefix("language_model."): dequantize(one) for name, one in weights.items()}


@pytest.mark.parametrize("symmetric", [False, True])
def test_compressed_tensors_copies_the_codes(tmp_path, symmetric):
    values = write_int4(tmp_path, symmetric=symmetric)
    options = ExportOptions("int4-symmetric" if symmetric else "int4")
    write_export(open_source(tmp_path / "m"), "compressed-tensors", tmp_path / "out", options)
    found = read_weights(tmp_path / "out")
    assert len(values) == 14
    assert all((found[f"language_model.{name}"] == value.numpy()).all() for name, value in values.items())


def test_tensorrt_llm_copies_symmetric_codes(tmp_path):
    values = write_int4(tmp_path, symmetric=True, **WIDE)
    source = open_source(tmp_path / "m")
    write_export(source, "tensorrt-llm", tmp_path / "out")
    write_export(source, "tensorrt-llm-legacy", tmp_path / "ranks", ExportOptions(tp_size=2))
    for found in (read_hub_folder(tmp_path / "out" / "llm"), read_ranks(tmp_path / "ranks")):
        assert all((found[name] == value.numpy()).all() for name, value in values.items())


def test_in_16_bits_the_values_of_the_codes_are_written(tmp_path):
    values = write_int4(tmp_path)
    write_export(open_source(tmp_path / "m"), "tensorrt-llm-legacy", tmp_path / "out", ExportOptions("float16"))
    found = read_ranks(tmp_path / "out")
    assert all((found[name] == value.half().float().numpy()).all() for name, value in values.items())


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("tensorrt-llm", ExportOptions(), ["zero points", "--symmetric"]),
        ("compressed-tensors", ExportOptions(group_size=32), ["64", "32", "--group-size"]),
        ("safetensors", ExportOptions(), ["14 decoder Linears", "--load-awq"]),
    ],
)
def test_unsupported_int4_models_are_an_error_with_the_reason(tmp_path, name, options, words):
    write_int4(tmp_path)
    with pytest.raises(LayoutError) as caught:
        write_export(open_source(tmp_path / "m"), name, tmp_path / "out", options)
    assert caught.value.file == str(tmp_path / "m") and all(word in caught.value.problem for word in words)
    assert not (tmp_path / "out").exists()


def test_a_search_for_an_int4_model_is_an_error(tmp_path):
    write_int4(tmp_path)
    model, _ = write_model(tmp_path / "again")
    with pytest.raises(LayoutError) as caught:
        open_source(tmp_path / "m", search=write_search(tmp_path, model))
    assert (caught.value.file, caught.value.field) == (str(tmp_path / "m"), "--load-awq")


def test_chunks_of_a_packed_weight_make_up_its_values(tmp_path):
    values = write_int4(tmp_path, **WIDE)
    source = open_source(tmp_path / "m")
    for name, value in values.items():
        runs = list(source.rows(f"language_model.{name}", torch.float32, chunk_bytes=1))
        assert max(map(len, runs)) == 64
        assert torch.equal(torch.cat(runs), value)
