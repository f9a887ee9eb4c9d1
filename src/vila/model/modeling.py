"""The network: a vision tower and an LLM built by transformers' Auto classes, and our projector between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from vila.model.config import VilaConfig
from vila.model.projector import build_projector
from vila.model.vision_tower import check_tower, multiscale_features, select_features, tower_dtype

# --- fusion
# Putting media vectors into the sequence, and the one mask that every path uses.


# B batch  S sequence (Q queries, K keys)  D model width  N media items  P patches


def merge_image_embeddings(embeds_BSD: Tensor, media_NPD: Tensor, is_placeholder_BS: Tensor) -> Tensor:
    """Put media vectors into their slots, in reading order.

    embeds_BSD: text embeddings; values at slots are ignored.
    media_NPD:  projected vectors of all pictures of the batch, row-major over (row, picture, patch).
    is_placeholder_BS:   bool, True where a media vector belongs.
    Returns a new tensor of the shape and dtype of `embeds_BSD`; gradients reach both inputs.
    Raises ValueError when the number of slots and vectors differ: going on would shift every later picture.
    """
    need = int(is_placeholder_BS.sum())
    have = media_NPD.shape[0] * media_NPD.shape[1]
    if need != have:
        raise ValueError(
            f"the batch has {need} media slots but the tower produced {have} vectors "
            f"({media_NPD.shape[0]} pictures of {media_NPD.shape[1]})"
        )
    return embeds_BSD.masked_scatter(is_placeholder_BS.unsqueeze(-1), media_NPD.to(embeds_BSD.dtype))


def segment_mask(segments_BS: Tensor, parents_BS: Tensor) -> Tensor:
    """Who may look at whom in packed rows: bool [B, 1, S, S], True = may attend.

    A token sees the earlier tokens of its own segment and of its segment's parent, and always itself; padding carries
    segment -1. Example: segments [0, 0, 1, 1, 2], parents [-1, -1, 0, 0, 0] are a shared prefix of two tokens with
    two branches; the last token sees places 0, 1 and 4.
    """
    keys = segments_BS[:, None, :]
    seen = (segments_BS[:, :, None] == keys) | (parents_BS[:, :, None] == keys)
    seen &= (keys >= 0) & torch.ones(
        segments_BS.shape[1], segments_BS.shape[1], dtype=torch.bool, device=keys.device
    ).tril()
    seen |= torch.eye(segments_BS.shape[1], dtype=torch.bool, device=keys.device)
    return seen[:, None]


def cached_mask(valid_BK: Tensor, num_queries: int) -> Tensor:
    """Mask of a cached step: bool [B, 1, Q, K]. The last `num_queries` of the K columns are the queries themselves.

    valid_BK: bool, False at columns that hold padding. Queries see every valid earlier column and themselves.
    """
    K = valid_BK.shape[1]
    causal_QK = torch.ones(num_queries, K, dtype=torch.bool, device=valid_BK.device).tril(K - num_queries)
    own_QK = torch.zeros_like(causal_QK)
    own_QK[:, K - num_queries :] = torch.eye(num_queries, dtype=torch.bool, device=valid_BK.device)
    return ((valid_BK[:, None, :] & causal_QK) | own_QK)[:, None]


# B batch  S sequence  D model width  V vocab  N media items  P patches  C tower width  H, W pixels


class VilaForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A visual language model. Sequences arrive with media already expanded to placeholder ids."""

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
        """The LLM's token embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the LLM's token embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The LLM's head."""
        return self.language_model.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        """The LLM without its head."""
        return self.language_model.get_decoder()

    def vision_features(self, pixels_N3HW: Tensor) -> Tensor:
        """Features of the tower, [N, P, C], without gradient when the tower is frozen."""
        tower = self.vision_tower
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())):
            pixels_N3HW = pixels_N3HW.to(tower_dtype(tower))
            if self.config.s2_scales:
                scales, tile = self.config.s2_scales, self.config.s2_max_split
                return multiscale_features(self._see, pixels_N3HW, scales, tile)
            return self._see(pixels_N3HW)

    def _see(self, pixels_N3HW: Tensor) -> Tensor:
        config = self.config
        return select_features(
            self.vision_tower, config.vision_config, pixels_N3HW, config.select_layer, config.select_feature
        )

    def project(self, features_NPC: Tensor) -> Tensor:
        """Features in the LLM's embedding space, [N, P', D]."""
        weight = next(self.projector.parameters(), None)
        return self.projector(features_NPC if weight is None else features_NPC.to(weight.dtype))

    def embed(self, ids_BS: Tensor, media_NPD: Tensor | None) -> Tensor:
        """Token embeddings [B, S, D] with media vectors in the placeholder slots."""
        is_placeholder_BS = ids_BS == self.config.image_token_id
        # The placeholder lies past the vocabulary and is masked before the look-up.
        embeds_BSD = self.get_input_embeddings()(ids_BS.masked_fill(is_placeholder_BS, 0))
        if media_NPD is None:
            media_NPD = embeds_BSD.new_zeros(0, 0, embeds_BSD.shape[-1])
        return merge_image_embeddings(embeds_BSD, media_NPD, is_placeholder_BS)

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
        """Logits over the expanded sequence.

        input_ids:      [B, S], placeholder ids where media vectors belong.
        pixel_values:   [N, 3, H, W] of all pictures in reading order; `features` [N, P, C] are the tower's output for
                        them, when it is known already.
        attention_mask: bool or float [B, 1, Q, K] as given, or [B, S] padding mask.
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
        """As in transformers. Raises ValueError for a batch padded on the right, which would be answered wrongly."""
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and not mask[:, -1].all():
            raise ValueError("the batch is padded on the right; give padding_side='left' to the processor to generate")
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool = False, use_cache: bool = True, **kwargs: Any
    ) -> dict[str, Any]:
        """Pictures are given to the first step only; later steps find them in the cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, use_cache=use_cache, **kwargs
        )
        if use_cache and not is_first_iteration:
            inputs["pixel_values"] = inputs["features"] = None
        return inputs
