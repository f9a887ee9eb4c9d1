"""Tiny random models and tokenizers for tests: seeded, in memory, one per LLM family."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import torch
from PIL import Image as PilImage
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from vila.core.types import Image
from vila.core.vision_spec import VisionSpec
from vila.model.config import VilaConfig
from vila.model.modeling import VilaForConditionalGeneration
from vila.model.processor import VilaProcessor

FAMILIES = ("llama", "mistral", "qwen2")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WIDTH = 32


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer with three special tokens and no BOS; `<|im_end|>` ends a sequence."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*SPECIALS, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )


def text_config(family: str, **changes: Any) -> Any:
    """A 2-layer, 32-wide LLM config with grouped key-value heads."""
    values = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer()),
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        # Large enough that different inputs give clearly different logits.
        "initializer_range": 0.2,
    }
    if family == "mistral":
        values["sliding_window"] = None
    config_class = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}[family]
    return config_class(**{**values, **changes})


def vision_config(tower: str = "dinov2") -> Any:
    """A 4-layer, 16-wide tower over 28 x 28 pixels: 2 x 2 patches."""
    values = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    if tower == "dinov2":
        return Dinov2Config(**values, initializer_range=0.2)
    config_class = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[tower]
    return config_class(**values, intermediate_size=32)


def vila(
    family: str = "llama", *, tower: str = "dinov2", template: str = "starter_qa", seed: int = 0, **text: Any
) -> tuple[VilaForConditionalGeneration, VilaProcessor]:
    """A random float32 model and its processor; an image takes four tokens. `text` changes the LLM's config."""
    spec = VisionSpec(28, 4, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "pad")
    config = VilaConfig(
        vision_config=vision_config(tower),
        text_config=text_config(family, **text),
        select_layer=-1,
        select_feature="cls_patch" if tower == "siglip" else "patch",
        image_token_id=len(tokenizer()),
        vision_spec=spec.to_dict(),
        template=template,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VilaForConditionalGeneration(config).eval()
        # Larger than the default initialisation, so that images change the logits clearly.
        with torch.no_grad():
            for parameter in model.projector.parameters():
                parameter.mul_(4)
    return model, VilaProcessor(tokenizer(), vision_spec=spec.to_dict(), template=template)


def image(seed: int, size: tuple[int, int] = (28, 28)) -> Image:
    """A random image, as PNG bytes."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    stream = io.BytesIO()
    PilImage.fromarray(noise.numpy()).save(stream, "PNG")
    return Image(stream.getvalue())
