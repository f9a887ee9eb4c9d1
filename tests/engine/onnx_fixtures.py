"""Models whose heads are wide enough for onnxruntime's attention, with biases that matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.fixtures import endless
from vila.engine.attention import ForwardBatch, TokenRange
from vila.engine.backend import new_runner
from vila.engine.engine import Engine
from vila.engine.runner_onnx import OnnxProgram
from vila.kernels.int4 import Int4Weight, dequantize, quantize

pytest.importorskip("onnxruntime")

IDS = torch.randint(0, 259, (1, 48), generator=torch.Generator().manual_seed(5))


def torch_engine(name: str = "llama", **changes: Any) -> Engine:
    """An endless engine, 64 wide, whose attention has random biases where its family has biases."""
    engine = endless(name, **{"hidden_size": 64, **changes})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in engine.model.language_model.named_parameters():
            if parameter_name.endswith("proj.bias"):
                parameter.normal_(0, 0.5, generator=generator)
    return engine


def onnx_engine(name: str = "llama", **changes: Any) -> Engine:
    """The same model, its LLM computed by onnxruntime."""
    engine = torch_engine(name, **changes)
    twin = Engine(engine.model, engine.processor, OnnxProgram(engine.model, threads=1))
    twin._stop_ids = frozenset()
    return twin


def rounded(engine: Engine, group_size: int = 32) -> dict[str, Int4Weight]:
    """The Linears of the blocks in 4 bits, by name."""
    layers = engine.model.language_model.model.layers
    linears = {name: module for name, module in engine.model.named_modules() if isinstance(module, torch.nn.Linear)}
    inside = {module for module in layers.modules()}
    return {name: quantize(m.weight, group_size) for name, m in linears.items() if m in inside}


def put_back(engine: Engine, weights: dict[str, Int4Weight]) -> None:
    """Give the model the rounded values."""
    modules = dict(engine.model.named_modules())
    with torch.no_grad():
        for name, weight in weights.items():
            modules[name].weight.copy_(dequantize(weight))


def full(engine: Engine, ids: Tensor = IDS) -> Tensor:
    """Logits [S, V] by torch, without a cache."""
    with torch.no_grad():
        return engine.model(input_ids=ids, use_cache=False).logits[0].float()


def embeds(engine: Engine, ids: Tensor = IDS) -> Tensor:
    """Embeddings [1, S, D] of ids."""
    with torch.no_grad():
        return engine.model.embed(ids, None)


class Decoder:
    """One KV row of an OnnxRunner, filled by prefills and single steps."""

    def __init__(self, model: Any, weights: dict[str, Int4Weight] | None = None, **options: Any) -> None:
        self.program = OnnxProgram(model, weights, **options)
        self.runner, _ = new_runner(model, 2, program=self.program)
        self.length = 0

    def logits_at(self, embeds_1SD: Tensor, places: Any) -> Tensor:
        """Append tokens; return logits [N, V] after some of them."""
        return self._append(TokenRange(0, self.length, [0] * embeds_1SD.shape[1], embeds_1SD[0], list(places)))

    def prefill(self, embeds_1SD: Tensor) -> Tensor:
        """Append tokens; return logits [V] after the last one."""
        return self.logits_at(embeds_1SD, [embeds_1SD.shape[1] - 1])[0]

    def step(self, token: int) -> Tensor:
        """Append one token; return logits [V]."""
        return self._append(TokenRange(0, self.length, [token]))[0]

    def _append(self, tokens: TokenRange) -> Tensor:
        logits = self.runner.forward(ForwardBatch([tokens])).clone()
        self.length += tokens.count
        return logits
