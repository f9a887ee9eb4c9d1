"""A quantized model directory: content, errors, and nothing incomplete left."""

import errno
import json
from dataclasses import replace

import pytest
import torch

from tests.other_process import HOST, PID, locked_elsewhere
from tests.quant.models import logits, loud, random_rows
from vila.core.errors import ConfigError, DirectoryInUseError, LayoutError, VilaError
from vila.model.int4_weights import dequantize_model, int4_weights
from vila.model.loading import load_model
from vila.quant import quantize
from vila.quant.awq_cache import load_search
from vila.quant.awq_search import search_model
from vila.quant.quant_config import BEST, QuantConfig
from vila.quant.quantize import quantize_checkpoint, work_folder

ROWS = random_rows(3)
AWQ = QuantConfig(group_size=32)


def made(out, request=AWQ, rows=ROWS, found=None, **options):
    return quantize_checkpoint(*loud(layers=2), out, request, rows, found, **options)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "config", [QuantConfig("rtn", group_size=32), AWQ, replace(BEST, group_size=32)], ids=["rtn", "awq", "best"]
)
def test_what_is_written_loads_and_computes_what_was_rounded(tmp_path, config):
    model, processor = loud(layers=2)
    summary = quantize_checkpoint(model, processor, tmp_path / "out", config, ROWS)
    again, _ = load_model(tmp_path / "out", dtype="float32")
    assert len(int4_weights(again)) == summary["linears"] == 14
    dequantize_model(model, torch.float32)
    dequantize_model(again, torch.float32)
    # Norms are kept in 16 bits. Worst of three: 4e-3 of logits up to 20.
    torch.testing.assert_close(logits(again, ROWS), logits(model, ROWS), atol=0.02, rtol=0)
    assert summary == json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert (tmp_path / "out" / "search.safetensors").is_file() == (config.method == "awq")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_search_of_before_gives_the_same_model_without_calibration(tmp_path):
    made(tmp_path / "first")
    found = load_search(tmp_path / "first" / "search.safetensors")
    made(tmp_path / "second", rows=None, found=found)
    first, second = files_of(tmp_path / "first"), files_of(tmp_path / "second")
    assert first.pop("quantization.json") != second.pop("quantization.json")
    assert first == second


def test_the_summary_has_method_calibration_sizes_and_errors(tmp_path):
    summary = made(tmp_path / "out", replace(BEST, group_size=32))
    assert summary["calibration"] == ROWS.metadata()
    assert (summary["method"], summary["rounding"], summary["group_size"]) == ("awq", "gptq", 32)
    assert summary["bytes_after"] < summary["bytes_before"]
    assert len(summary["blocks"]) == 2
    assert all(0 < block["weights_off"] < 0.5 and 0 < block["error_left"] <= 1 for block in summary["blocks"])


@pytest.mark.parametrize(
    ("config", "rows", "field", "value"),
    [
        (
            QuantConfig(group_size=128),
            ROWS,
            "group_size",
            128,
        ),
        (AWQ, None, "calibration", None),
        (QuantConfig("rtn", rounding="gptq", group_size=32), None, "calibration", None),
    ],
)
def test_impossible_options_are_errors_and_leave_nothing(tmp_path, config, rows, field, value):
    with pytest.raises(ConfigError) as caught:
        made(tmp_path / "out", config, rows)
    assert (caught.value.field, caught.value.value) == (field, value)
    assert list(tmp_path.iterdir()) == []


def test_a_search_that_does_not_belong_is_refused(tmp_path):
    found = search_model(loud(layers=2)[0], ROWS, QuantConfig(group_size=16))
    with pytest.raises(ConfigError) as caught:
        made(tmp_path / "out", found=found)
    assert (caught.value.field, caught.value.value, caught.value.expected) == ("group_size", 32, "16")
    with pytest.raises(ConfigError) as caught:
        made(tmp_path / "out", QuantConfig("rtn", group_size=16), found=found)
    assert (caught.value.field, caught.value.value) == ("method", "rtn")
    deeper = search_model(loud(layers=3)[0], ROWS, QuantConfig(group_size=32))
    with pytest.raises(LayoutError) as caught:
        made(tmp_path / "out", found=deeper)
    assert caught.value.field.startswith("model.layers.2.")
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_model_and_one_with_nan_are_refused(tmp_path):
    made(tmp_path / "out")
    with pytest.raises(LayoutError) as caught:
        quantize_checkpoint(*load_model(tmp_path / "out"), tmp_path / "again", AWQ, ROWS)
    assert caught.value.expected == "a Linear"
    model, processor = loud(layers=2)
    model.language_model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(LayoutError) as caught:
        quantize_checkpoint(model, processor, tmp_path / "nan", AWQ, ROWS)
    assert caught.value.field == "model.layers.1.mlp.up_proj"


def test_a_full_disk_is_an_error_and_finished_blocks_are_reused(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(quantize, "save_model", full)
    with pytest.raises(VilaError) as caught:
        made(tmp_path / "out")
    assert caught.value.file == str(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [work_folder(tmp_path / "out").name]
    monkeypatch.undo()
    made(tmp_path / "out")
    made(tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


def test_a_directory_that_another_process_quantizes_into_is_refused_with_host_and_pid(tmp_path):
    with locked_elsewhere(work_folder(tmp_path / "out")), pytest.raises(DirectoryInUseError) as caught:
        made(tmp_path / "out", QuantConfig("rtn", group_size=32))
    assert (caught.value.host, caught.value.pid) == (HOST, PID)
