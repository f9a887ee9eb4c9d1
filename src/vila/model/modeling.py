"""The network: vision tower and LLM built by transformers' Auto classes, our projector between them, and its masks."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import CausalLMOutputWithPast

from vila.model.config import VilaConfig
from vila.model.projector import build_projector
from vila.model.vision_sizes import check_tower
from vila.model.vision_tower import multiscale_features, select_features, tower_dtype

# B batch  S sequence  Q queries  K keys  D model width  N images  P patches  C tower width  H, W pixels


def merge_image_embeddings(embeds_BSD: Tensor, images_NPD: Tensor, is_placeholder_BS: Tensor) -> Tensor:
    """Replace image-placeholder embeddings with projected image features, in reading order.

    embeds_BSD:        text embeddings; values at placeholders are ignored.
    images_NPD:        projected features of all images of the batch, row-major over (sample, image, patch).
    is_placeholder_BS: bool, True at image placeholders.
    Returns a new tensor of the shape and dtype of `embeds_BSD`; gradients reach both inputs.
    Raises ValueError if the numbers of placeholders and features differ: continuing would shift every later image.
    """
    need = int(is_placeholder_BS.sum())
    num_images, num_patches = images_NPD.shape[:2]
    have = num_images * num_patches
    if need != have:
        features = f"{have} image features ({num_images} images x {num_patches} tokens)"
        raise ValueError(f"{need} image placeholders, but {features}")
    return embeds_BSD.masked_scatter(is_placeholder_BS.unsqueeze(-1), images_NPD.to(embeds_BSD.dtype))


def segment_mask(segments_BS: Tensor, parents_BS: Tensor) -> Tensor:
    """Return the attention mask of packed sequences: bool [B, 1, S, S], True where a query may attend to a key.

    A token attends to itself and to the earlier tokens of its own segment and of the parent segment; padding has
    segment id -1. Example: segments [0, 0, 1, 1, 2] with parents [-1, -1, 0, 0, 0] are a shared prefix of two tokens
    and two branches; the last token attends to positions 0, 1 and 4. Reference implementation of `packed_attention`.
    """
    keys = segments_BS[:, None, :]
    visible = (segments_BS[:, :, None] == keys) | (parents_BS[:, :, None] == keys)
    visible &= (keys >= 0) & torch.ones(
        segments_BS.shape[1], segments_BS.shape[1], dtype=torch.bool, device=keys.device
    ).tril()
    visible |= torch.eye(segments_BS.shape[1], dtype=torch.bool, device=keys.device)
    return visible[:, None]


def cached_mask(valid_BK: Tensor, num_queries: int) -> Tensor:
    """Return the attention mask with a KV cache, bool [B, 1, Q, K]; the last `num_queries` columns are the queries.

    valid_BK: bool, False at padding. A query attends to itself and to every valid earlier column.
    """
    K = valid_BK.shape[1]
    causal_QK = torch.ones(num_queries, K, dtype=torch.bool, device=valid_BK.device).tril(K - num_queries)
    own_QK = torch.zeros_like(causal_QK)
    own_QK[:, K - num_queries :] = torch.eye(num_queries, dtype=torch.bool, device=valid_BK.device)
    return ((valid_BK[:, None, :] & causal_QK) | own_QK)[:, None]


def build_on_meta(config: VilaConfig) -> VilaForConditionalGeneration:
    """Build a model with its weights on the meta device, where they are not initialised; buffers are computed."""
    with init_empty_weights(include_buffers=False), no_init_weights():
        return VilaForConditionalGeneration(config)


class VilaForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A visual language model. Input sequences contain one placeholder id per image feature."""

    config_class = VilaConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]

    def __init__(self, config: VilaConfig) -> None:
        super().__init__(config)
        check_tower(config.vision_config, config.select_feature)
        self.vision_tower = AutoModel.from_config(config.vision_config, trust_remote_code=False)
        self.projector = build_projector(config.projector_type, config.vision_width, config.text_config.hidden_size)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the LLM's token embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the LLM's token embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the LM head."""
        return self.language_model.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        """Return the LLM without its LM head."""
        return self.language_model.get_decoder()

    def vision_features(self, pixels_N3HW: Tensor) -> Tensor:
        """Return the features of the tower, [N, P, C], without gradient if the tower is frozen."""
        tower = self.vision_tower
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())):
            pixels_N3HW = pixels_N3HW.to(tower_dtype(tower))
            if self.config.s2_scales:
                scales, tile = self.config.s2_scales, self.config.s2_max_split
                return multiscale_features(self._encode, pixels_N3HW, scales, tile)
            return self._encode(pixels_N3HW)

    def _encode(self, pixels_N3HW: Tensor) -> Tensor:
        config = self.config
        return select_features(
            self.vision_tower, config.vision_config, pixels_N3HW, config.select_layer, config.select_feature
        )

    def project(self, features_NPC: Tensor) -> Tensor:
        """Project features [N, P, C] to the LLM's width, [N, P', D]."""
        weight = next(self.projector.parameters(), None)
        return self.projector(features_NPC if weight is None else features_NPC.to(weight.dtype))

    def embed(self, ids_BS: Tensor, images_NPD: Tensor | None) -> Tensor:
        """Return token embeddings [B, S, D] with image features at the placeholders."""
        is_placeholder_BS = ids_BS == self.config.image_token_id
        # The placeholder id is outside the vocabulary, so it is replaced before the embedding lookup.
        embeds_BSD = self.get_input_embeddings()(ids_BS.masked_fill(is_placeholder_BS, 0))
        if images_NPD is None:
            images_NPD = embeds_BSD.new_zeros(0, 0, embeds_BSD.shape[-1])
        return merge_image_embeddings(embeds_BSD, images_NPD, is_placeholder_BS)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logits of the sequence.

        input_ids:      [B, S], with placeholder ids for image features.
        pixel_values:   [N, 3, H, W], all images in reading order; or `features` [N, P, C], the tower's output for them.
        attention_mask: bool or float [B, 1, Q, K], used as is, or a padding mask [B, S].
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("forward needs input_ids or inputs_embeds")
            if features is None and pixel_values is not None and pixel_values.shape[0]:
                features = self.vision_features(pixel_values)
            inputs_embeds = self.embed(input_ids, None if features is None else self.project(features))
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as in transformers. Raises ValueError for a right-padded batch, whose answers would be wrong."""
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and not mask[:, -1].all():
            raise ValueError("right-padded batch; call the processor with padding_side='left' for generation")
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool = False, use_cache: bool = True, **kwargs: Any
    ) -> dict[str, Any]:
        """Pass images in the first step only; later steps use the KV cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, use_cache=use_cache, **kwargs
        )
        if use_cache and not is_first_iteration:
            inputs["pixel_values"] = inputs["features"] = None
        return inputs
