"""The backend of an engine is chosen once, and said."""

import sys

import pytest

from tests import tiny
from tests.engine.onnx_fixtures import rounded, torch_engine
from vila.core.errors import ConfigError
from vila.engine.backend import check_backend, choose_program
from vila.kernels.int4 import Int4Linear
from vila.model.int4_weights import int4_layers, use_int4
from vila.quant.apply import quantize_model


class Heard:
    def __init__(self):
        self.lines = []

    def started(self, task, total=None, unit=""):
        pass

    def advanced(self, task, amount=1, **facts):
        pass

    def log(self, text):
        self.lines.append(text)

    def finished(self, task, summary=""):
        pass


def four_bit():
    engine = torch_engine()
    use_int4(engine.model, rounded(engine))
    return engine.model


def test_a_full_model_stays_with_torch_and_nothing_is_said():
    heard = Heard()
    assert choose_program(torch_engine().model, events=heard) is None
    assert heard.lines == []


def test_a_four_bit_model_on_a_cpu_decodes_by_onnxruntime_with_a_head_of_8_bits():
    heard = Heard()
    model = four_bit()
    program = choose_program(model, threads=1, events=heard)
    assert heard.lines == ["backend: onnx on cpu, 1 threads, 4-bit weights, 8-bit activations, 8-bit head"]
    assert program.weight_bytes < choose_program(model, "onnx", head_bits=32, threads=1).weight_bytes


def test_torch_multiplies_four_bits_by_a_backend_that_is_named():
    heard = Heard()
    model = four_bit()
    assert choose_program(model, "torch", events=heard) is None
    chosen = {layer.backend for _, layer in int4_layers(model)}
    assert len(chosen) == 1
    assert heard.lines[0].startswith(f"int4: {chosen.pop()} on cpu, float32 activations, 14 layers")


def test_without_onnxruntime_a_four_bit_model_goes_to_torch_and_the_reason_is_said(monkeypatch):
    model = four_bit()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    heard = Heard()
    assert choose_program(model, events=heard) is None
    assert heard.lines[0].startswith("backend: torch; not onnx: ")
    assert "pip install 'vila-vlm[onnx]'" in heard.lines[0]
    assert any(isinstance(module, Int4Linear) for module in model.modules())
    with pytest.raises(ConfigError, match=r"pip install 'vila-vlm\[onnx\]'"):
        check_backend("onnx", 0, 0, "cpu")


def test_a_four_bit_model_that_onnxruntime_cannot_compute_goes_to_torch_and_the_reason_is_said():
    heard = Heard()
    model, _ = tiny.vila(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    use_int4(model, quantize_model(model, None, 16))
    assert choose_program(model, events=heard) is None
    assert heard.lines[0].startswith("backend: torch; not onnx:") and "head width 8" in heard.lines[0]
    with pytest.raises(ConfigError, match="head width 8"):
        choose_program(model, "onnx")


def test_bits_of_activations_are_not_left_out_in_silence():
    with pytest.raises(ConfigError, match="activation_bits.*weights are not 4-bit"):
        choose_program(torch_engine().model, activation_bits=16)
    with pytest.raises(ConfigError, match="activation_bits"):
        check_backend("torch", 0, 0, "cpu", 16)
