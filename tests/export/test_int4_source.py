"""A model that is in INT4 already keeps its own codes where the format can hold them, and is refused elsewhere."""

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
def test_compressed_tensors_takes_the_codes_over(tmp_path, symmetric):
    values = write_int4(tmp_path, symmetric=symmetric)
    options = ExportOptions("int4-symmetric" if symmetric else "int4")
    write_export(open_source(tmp_path / "m"), "compressed-tensors", tmp_path / "out", options)
    found = read_weights(tmp_path / "out")
    assert len(values) == 14
    assert all((found[f"language_model.{name}"] == value.numpy()).all() for name, value in values.items())


def test_tensorrt_llm_takes_symmetric_codes_over(tmp_path):
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
    ("name", "options", "message"),
    [
        ("tensorrt-llm", ExportOptions(), "zero points, which symmetric codes cannot hold; export the model that was"),
        ("compressed-tensors", ExportOptions(group_size=32), "groups of 64, not 32; leave --group-size out"),
        ("safetensors", ExportOptions(), "14 Linears of its decoder have no weight in full precision"),
    ],
)
def test_what_cannot_take_them_says_so(tmp_path, name, options, message):
    write_int4(tmp_path)
    with pytest.raises(LayoutError, match=message):
        write_export(open_source(tmp_path / "m"), name, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_a_search_comes_too_late(tmp_path):
    write_int4(tmp_path)
    model, _ = write_model(tmp_path / "again")
    with pytest.raises(LayoutError, match="rounded to INT4 already and take no scales"):
        open_source(tmp_path / "m", search=write_search(tmp_path, model))


def test_runs_of_rows_of_a_packed_weight_make_up_its_values(tmp_path):
    values = write_int4(tmp_path, **WIDE)
    source = open_source(tmp_path / "m")
    for name, value in values.items():
        runs = list(source.rows(f"language_model.{name}", torch.float32, run_bytes=1))
        assert max(map(len, runs)) == 64
        assert torch.equal(torch.cat(runs), value)
