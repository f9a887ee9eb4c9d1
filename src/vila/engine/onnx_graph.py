"""ONNX graph of a decoder step with fused operators; weights are passed separately, by name.

onnxruntime's contrib operators: MatMulNBits, GroupQueryAttention (with rotary embedding and in-place KV cache),
SkipSimplifiedLayerNormalization (residual addition and RMSNorm) and QuickGelu (SiLU with alpha 1).

    embeds [B,S,D]  past_key_i, past_value_i [B,H,C,E]  last_key [B]  length [1]  places [N]  ->  logits [B,N,V]

`last_key` is the index of each row's last filled column and `length` the length of the longest row, both after this
step; `places` are indices of the S tokens whose logits are computed. With several rows S is 1. The present caches are
outputs that must be bound to the same buffers as the past ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from vila.engine.onnx_weights import ActivationBits, Block, DecoderWeights, Matrix

# B rows  S tokens of a step  D model width  H KV heads  C capacity  E head width  N positions with logits  V vocab

_OPSET, _IR_VERSION = 21, 10
_FUSED = "com.microsoft"
# accuracy_level of MatMulNBits: 4 rounds activations to int8 per weight group, 1 keeps float32.
_INT8, _FLOAT32 = 4, 1


@dataclass
class _Graph:
    """Nodes and arrays of a graph under construction."""

    activation_bits: ActivationBits
    nodes: list[Any] = field(default_factory=list)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    constants: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Small arrays stored in the graph, such as shapes."""

    def array(self, name: str, values: NDArray[Any]) -> str:
        self.arrays[name] = values
        return name

    def constant(self, name: str, values: list[Any], kind: Any = np.int64) -> str:
        self.constants[name] = np.array(values, kind)
        return name

    def add(self, kind: str, inputs: list[str], outputs: list[str], domain: str = _FUSED, **attributes: Any) -> None:
        # A node is named after its first output.
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=outputs[0], domain=domain, **attributes))

    def matmul(self, x: str, matrix: Matrix, name: str) -> str:
        """`x @ matrix.T + bias`, named `name`."""
        bias = [] if matrix.bias_O is None else [self.array(f"{name}.bias", matrix.bias_O)]
        values = self.array(f"{name}.values", matrix.values)
        if matrix.bits == 32:
            self.add("FusedMatMul", [x, values], [f"{name}.product" if bias else name], transB=1)
            if bias:
                self.add("Add", [f"{name}.product", *bias], [name], domain="")
            return name
        if self.activation_bits == 16:
            # The bias must not be added to both halves.
            parts = self.halves(x, matrix.group_size, name)
            both = self._quantized_matmul(parts, matrix, name, f"{name}.both", values, [])
            self.add("Split", [both], [f"{name}.high", f"{name}.low"], domain="", axis=1, num_outputs=2)
            self.add("Add", [f"{name}.high", f"{name}.low"], [f"{name}.product" if bias else name], domain="")
            if bias:
                self.add("Add", [f"{name}.product", *bias], [name], domain="")
            return name
        return self._quantized_matmul(x, matrix, name, name, values, bias)

    def _quantized_matmul(self, x: str, matrix: Matrix, name: str, output: str, values: str, bias: list[str]) -> str:
        assert matrix.scales is not None and matrix.zeros is not None
        scales, zeros = self.array(f"{name}.scales", matrix.scales), self.array(f"{name}.zeros", matrix.zeros)
        self.add(
            "MatMulNBits",
            [x, values, scales, zeros, *(["", *bias] if bias else [])],
            [output],
            K=matrix.num_inputs,
            N=matrix.num_outputs,
            bits=matrix.bits,
            block_size=matrix.group_size,
            accuracy_level=_FLOAT32 if self.activation_bits == 32 else _INT8,
        )
        return output

    def halves(self, x: str, group_size: int, name: str) -> str:
        """Split x [B,S,I] into [B,2S,I]: its int8 rounding per group, then the remainder."""

        def step(kind: str, inputs: list[str], what: str, **attributes: Any) -> str:
            self.add(kind, inputs, [f"{name}.{what}"], domain="", **attributes)
            return f"{name}.{what}"

        groups = self.constant(f"groups_of_{group_size}", [0, 0, -1, group_size])
        whole, last = self.constant("whole_rows", [0, 0, -1]), self.constant("last_axis", [-1])
        least, most = self.constant("least", [1e-30], np.float32), self.constant("most", [127], np.float32)
        grouped = step("Reshape", [x, groups], "grouped")
        top = step("ReduceMax", [step("Abs", [grouped], "sizes"), last], "top", keepdims=1)
        scale = step("Div", [step("Max", [top, least], "range"), most], "scale")
        codes = step("Round", [step("Div", [grouped, scale], "scaled")], "codes")
        high = step("Reshape", [step("Mul", [codes, scale], "rounded"), whole], "x_high")
        return step("Concat", [high, step("Sub", [x, high], "x_low")], "halves", axis=1)

    def add_and_norm(self, states: str, change: str, gamma: NDArray[Any], name: str, eps: float) -> tuple[str, str]:
        """RMSNorm of `states + change`, and that sum."""
        weight = self.array(f"{name}.weight", gamma)
        outputs = [name, "", "", f"{name}.sum"]
        self.add("SkipSimplifiedLayerNormalization", [states, change, weight], outputs, epsilon=eps)
        return name, f"{name}.sum"


def cache_names(num_layers: int) -> list[tuple[str, str]]:
    """Return input and output names of every cache, keys and values of each layer in turn."""
    kinds = ("key", "value")
    return [(f"past_{kind}_{layer}", f"present_{kind}_{layer}") for layer in range(num_layers) for kind in kinds]


def decoder_graph(
    weights: DecoderWeights, *, activation_bits: ActivationBits
) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
    """Return the graph, and the arrays of its initializers, which it holds by name and shape only.

    activation_bits: activations of quantized matmuls: int8 (8), int8 plus the int8 remainder (16), or float32 (32).
    """
    graph = _Graph(activation_bits)
    graph.array("cos", weights.cos)
    graph.array("sin", weights.sin)
    first = weights.blocks[0]
    states = "embeds"
    inputs = [states, graph.array("block_0.attention_norm.weight", first.attention_norm_D)]
    graph.add("SimplifiedLayerNormalization", inputs, ["normed"], domain="", axis=-1, epsilon=weights.eps)
    normed = "normed"
    for index, block in enumerate(weights.blocks):
        name = f"block_{index}"
        attended = _attention(graph, normed, weights, index)
        normed, states = graph.add_and_norm(states, attended, block.mlp_norm_D, f"{name}.mlp_norm", weights.eps)
        change = _mlp(graph, normed, block, name)
        last = index + 1 == len(weights.blocks)
        gamma = weights.norm_D if last else weights.blocks[index + 1].attention_norm_D
        following = "norm" if last else f"block_{index + 1}.attention_norm"
        normed, states = graph.add_and_norm(states, change, gamma, following, weights.eps)
    graph.add("Gather", [normed, "places"], ["wanted"], domain="", axis=1)
    graph.matmul("wanted", weights.head, "logits")
    return _model(graph, weights), graph.arrays


def _attention(graph: _Graph, normed: str, weights: DecoderWeights, index: int) -> str:
    block, name = weights.blocks[index], f"block_{index}"
    # A fused QKV projection is one input; the key and value inputs stay empty.
    qkv = [graph.matmul(normed, part, f"{name}.qkv_{i}") for i, part in enumerate(block.qkv)]
    (past_key, present_key), (past_value, present_value) = cache_names(index + 1)[-2:]
    graph.add(
        "GroupQueryAttention",
        [*(qkv if len(qkv) > 1 else [*qkv, "", ""]), past_key, past_value, "last_key", "length", "cos", "sin"],
        [f"{name}.attended", present_key, present_value],
        num_heads=weights.num_heads,
        kv_num_heads=weights.num_kv_heads,
        scale=weights.head_width**-0.5,
        do_rotary=1,
        local_window_size=-1 if block.window is None else block.window,
    )
    return graph.matmul(f"{name}.attended", block.out, f"{name}.out")


def _mlp(graph: _Graph, normed: str, block: Block, name: str) -> str:
    parts = [graph.matmul(normed, part, f"{name}.gate_up_{i}") for i, part in enumerate(block.gate_up)]
    if len(parts) == 1:
        graph.add("Split", parts, [f"{name}.gate", f"{name}.up"], domain="", axis=-1, num_outputs=2)
        parts = [f"{name}.gate", f"{name}.up"]
    graph.add("QuickGelu", [parts[0]], [f"{name}.silu"], alpha=1.0)
    graph.add("Mul", [f"{name}.silu", parts[1]], [f"{name}.gated"], domain="")
    return graph.matmul(f"{name}.gated", block.down, f"{name}.down")


def _model(graph: _Graph, weights: DecoderWeights) -> onnx.ModelProto:
    cache: list[str | int | None] = ["B", weights.num_kv_heads, "C", weights.head_width]
    names = cache_names(len(weights.blocks))
    info = helper.make_tensor_value_info
    inputs: list[Any] = [
        info("embeds", TensorProto.FLOAT, ["B", "S", weights.width]),
        info("last_key", TensorProto.INT32, ["B"]),
        info("length", TensorProto.INT32, [1]),
        info("places", TensorProto.INT64, ["N"]),
        *(info(past, TensorProto.FLOAT, cache) for past, _ in names),
    ]
    outputs: list[Any] = [
        info("logits", TensorProto.FLOAT, ["B", "N", weights.head.num_outputs]),
        *(info(present, TensorProto.FLOAT, cache) for _, present in names),
    ]
    initializers = [_described(name, values) for name, values in graph.arrays.items()]
    initializers += [numpy_helper.from_array(values, name) for name, values in graph.constants.items()]
    whole = helper.make_graph(graph.nodes, "decoder step", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_FUSED, 1)]
    return helper.make_model(whole, opset_imports=opsets, ir_version=_IR_VERSION)


def _described(name: str, values: NDArray[Any]) -> TensorProto:
    """Return an initializer without its data, because a graph with data is limited to 2 GB."""
    kind = helper.np_dtype_to_tensor_dtype(values.dtype)
    tensor = TensorProto(name=name, dims=values.shape, data_type=kind, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "memory"), ("offset", "0"), ("length", str(values.nbytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor
