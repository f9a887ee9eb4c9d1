"""The table of supported models in docs/export.md agrees with the export formats."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, Dinov2Config, LlamaConfig, SiglipVisionConfig

from tests import tiny
from tests.export.gguf_fixtures import llama_tokenizer
from vila.core.vision_spec import VisionSpec
from vila.export.base import EXPORTS, ExportOptions, resolve_options
from vila.export.source import ExportSource
from vila.model.config import VilaConfig
from vila.model.modeling import VilaForConditionalGeneration
from vila.model.processor import VilaProcessor
from vila.model.weights import TensorRef, published_state_dict

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
_VICUNA = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, rms_norm_eps=1e-5)
_CLIP = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
_SIGLIP = SiglipVisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)
_SMOL = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=2,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)
_DINO = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=224, patch_size=14)
# Tower, LLM, projector, select_layer, select_feature, tokens per image.
MODELS = {
    "VILA-1.0": (_CLIP, _VICUNA, "linear", -2, "patch", 576),
    "LLaVA-1.5": (_CLIP, _VICUNA, "mlp2x_gelu", -2, "patch", 576),
    "VILA-1.5": (_SIGLIP, _VICUNA, "mlp_downsample", -2, "cls_patch", 196),
    "Starter": (_DINO, _SMOL, "mlp2x_gelu", -2, "patch", 256),
}


def source_of(tower, llm, projector, layer, feature, tokens):
    """Return a model of real sizes without weights, which `problems` does not read."""
    spec = VisionSpec(tower.image_size, tokens, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "square").to_dict()
    config = VilaConfig(
        vision_config=tower,
        text_config=llm,
        projector_type=projector,
        select_layer=layer,
        select_feature=feature,
        image_token_id=llm.vocab_size,
        vision_spec=spec,
        template="vicuna_v1",
    )
    with torch.device("meta"):
        model = VilaForConditionalGeneration(config)
    tensors = {
        name: TensorRef(None, name, tuple(one.shape), torch.float16)
        for name, one in published_state_dict(model).items()
    }
    # The LLaMA tokenizer is slow, and only one format of this model needs it.
    tokenizer = llama_tokenizer() if tower is _CLIP and projector == "mlp2x_gelu" else tiny.tokenizer()
    processor = VilaProcessor(tokenizer, vision_spec=spec, template="vicuna_v1")
    return ExportSource(Path("model"), config, processor, tensors)


def cell(name, source):
    """Return the supported precisions, with the first group size that fits: yes, no, or a list."""
    target, out = EXPORTS[name], []
    for precision in target.precisions:
        groups = (128, 64, 32, 0) if "group_size" in target.options else (0,)
        for group in groups:
            if not target.problems(source, resolve_options(target, ExportOptions(precision, group_size=group))):
                out.append(precision)
                break
    if len(out) == len(target.precisions):
        return "yes"
    return ", ".join(f"`{precision}`" for precision in out) or "no"


@pytest.fixture(scope="module")
def sources():
    return {name: source_of(*facts) for name, facts in MODELS.items()}


@pytest.mark.parametrize("name", list(EXPORTS))
def test_the_page_lists_the_supported_models_of_every_format(name, sources):
    row = f"| `{name}` | {' | '.join(cell(name, source) for source in sources.values())} |"
    assert row in PAGE.read_text(encoding="utf-8").splitlines(), f"docs/export.md wants the row:\n{row}"
