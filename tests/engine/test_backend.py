"""Selection of the backend of an engine; the choice is logged."""

import sys

import pytest
import torch

from tests import tiny
from tests.engine.onnx_fixtures import rounded, torch_engine
from tests.events import EventLog
from vila.core.errors import ConfigError
from vila.engine.backend import check_backend, choose_program
from vila.kernels.int4 import Int4Linear
from vila.model.int4_weights import int4_layers, use_int4
from vila.model.loading import choose_dtype
from vila.quant.apply import quantize_model


def four_bit():
    engine = torch_engine()
    use_int4(engine.model, rounded(engine))
    return engine.model


def test_full_precision_model_runs_on_torch_without_a_log_line():
    events = EventLog()
    assert choose_program(torch_engine().model, events=events) is None
    assert events.lines == []


def test_int4_model_on_a_cpu_runs_on_onnxruntime_with_an_8_bit_head():
    events = EventLog()
    model = four_bit()
    program = choose_program(model, threads=1, events=events)
    assert events.lines == ["backend: onnx on cpu, 1 threads, 4-bit weights, 8-bit activations, 8-bit head"]
    assert program.weight_bytes < choose_program(model, "onnx", head_bits=32, threads=1).weight_bytes


def test_int4_kernel_of_torch_is_logged():
    events = EventLog()
    model = four_bit()
    assert choose_program(model, "torch", events=events) is None
    chosen = {layer.backend for _, layer in int4_layers(model)}
    assert len(chosen) == 1
    assert events.lines[0].startswith(f"int4: {chosen.pop()} on cpu, float32 activations, 14 layers")


def test_without_onnxruntime_int4_model_runs_on_torch_with_a_logged_reason(monkeypatch):
    model = four_bit()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    events = EventLog()
    assert choose_program(model, events=events) is None
    assert events.lines[0].startswith("backend: torch; not onnx: ")
    assert "pip install 'vila-vlm[onnx]'" in events.lines[0]
    assert any(isinstance(module, Int4Linear) for module in model.modules())
    with pytest.raises(ConfigError, match=r"pip install 'vila-vlm\[onnx\]'"):
        check_backend("onnx", 0, 0, "cpu")


def test_int4_model_that_onnxruntime_does_not_support_runs_on_torch_with_a_logged_reason():
    events = EventLog()
    model, _ = tiny.vila(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    use_int4(model, quantize_model(model, None, 16))
    assert choose_program(model, events=events) is None
    assert events.lines[0].startswith("backend: torch; not onnx:") and "head width 8" in events.lines[0]
    with pytest.raises(ConfigError, match="head width 8"):
        choose_program(model, "onnx")


def test_ignored_activation_bits_are_rejected():
    with pytest.raises(ConfigError, match="activation_bits.*weights are not 4-bit"):
        choose_program(torch_engine().model, activation_bits=16)
    with pytest.raises(ConfigError, match="activation_bits"):
        check_backend("torch", 0, 0, "cpu", 16)


def test_emulated_bfloat16_is_logged(monkeypatch):
    monkeypatch.setattr("vila.engine.backend.has_fast_bfloat16", lambda device: False)
    monkeypatch.setattr("vila.model.loading.has_fast_bfloat16", lambda device: False)
    engine = torch_engine()
    events = EventLog()
    assert choose_program(engine.model.bfloat16(), events=events) is None
    assert "float32" in events.lines[0]
    assert choose_dtype("auto", "cpu", events) is torch.float32
    assert choose_dtype("bfloat16", "cpu", events) is torch.bfloat16
    assert len(events.lines) == 2
