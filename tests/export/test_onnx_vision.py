"""Tower and projector as an ONNX graph, run by onnxruntime and compared with the model."""

import json

import onnx
import pytest
import torch

from tests import tiny
from tests.export.gguf_fixtures import export, seeing
from vila.export.onnx_vision import OPSET
from vila.model.modeling import VilaForConditionalGeneration

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; it is in the extra [onnx]")


def run(folder, pixels):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "vision.onnx", options)
    return session.run(None, {"pixels": pixels.numpy()})[0]


def assert_same(model, folder, side):
    for number in (1, 3):
        pixels = torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            wanted = model.project(model.vision_features(pixels)).numpy()
        found = run(folder, pixels)
        assert found.shape == wanted.shape
        # Of the greatest value; worst measured 2e-6 (onnxruntime 1.32, torch 2.13).
        assert abs(found - wanted).max() < 1e-4 * max(1, abs(wanted).max())


@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
def test_the_graph_gives_the_embeddings_of_the_model_for_any_batch(tmp_path, tower):
    model, processor = tiny.vila(tower=tower)
    assert_same(model, export(tmp_path, model, processor, "onnx", "f32"), 28)


@pytest.mark.parametrize(
    ("tower", "projector"), [("clip", "linear"), ("siglip", "mlp_downsample"), ("clip", "mlp3x_gelu")]
)
def test_every_projector_has_a_graph(tmp_path, tower, projector):
    model, processor = seeing(tower, projector)
    assert_same(model, export(tmp_path, model, processor, "onnx", "f32"), 56)


def test_positions_of_another_size_are_interpolated_before_export(tmp_path):
    """DINOv2 with positions for 56 pixels, asked for 28: runtimes interpolate in their own ways."""
    config = tiny.vila()[0].config
    config.vision_config.image_size = 56
    torch.manual_seed(0)
    model = VilaForConditionalGeneration(config).eval()
    assert_same(model, export(tmp_path, model, tiny.vila()[1], "onnx", "f32"), 28)


def test_the_graph_has_its_opset_and_no_unused_block(tmp_path):
    model, processor = seeing("clip", select_layer=-3)
    out = export(tmp_path, model, processor, "onnx", "f32")
    graph = onnx.load(out / "vision.onnx")
    assert [(one.domain, one.version) for one in graph.opset_import] == [("", OPSET)]
    batch = graph.graph.input[0].type.tensor_type.shape.dim[0]
    assert batch.dim_param == "batch"
    assert sum(node.op_type == "Softmax" for node in graph.graph.node) == 2  # of four blocks
    facts = json.loads((out / "vision.json").read_text())
    assert facts["opset"] == OPSET and facts["mean"] == list(processor.spec.mean)
