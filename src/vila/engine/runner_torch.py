"""Model runners: the logits of a forward batch over the tokens of all requests. The runner of torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from vila.core.errors import ConfigError
from vila.engine.attention import Attention, ForwardBatch, RaggedAttention, use_ragged_attention
from vila.engine.fast_decoder import FastDecoder
from vila.engine.kv_cache import KVCache
from vila.engine.vision_cache import HashedImage, Prompt, VisionCache
from vila.model.modeling import VilaForConditionalGeneration

# T tokens of a pass  S tokens of a prompt  D model width  V vocab  N positions with logits


class ModelRunner(ABC):
    """A model with its vision cache and KV cache; subclasses run the forward passes."""

    def __init__(self, model: VilaForConditionalGeneration, features: VisionCache, cache: KVCache) -> None:
        self.model, self.features, self.cache = model, features, cache

    def encode(self, images: Sequence[HashedImage], pixels_N3HW: Tensor) -> None:
        """Compute the tower features of images and add them to the vision cache."""
        self.features.add(images, self.model.vision_features(pixels_N3HW.to(self.model.device)))

    def embed(self, prompt: Prompt, start: int) -> tuple[Tensor, int]:
        """Return the embeddings [S, D] of a prompt from position `start`, and the position of the first.

        If `start` is inside an image, the embeddings begin with that image. All images must be in the vision cache.
        """
        places = [(begin, count, image) for (begin, count), image in zip(prompt.runs, prompt.images, strict=True)]
        start = min([start, *(begin for begin, count, _ in places if begin < start < begin + count)])
        images = [image for begin, _, image in places if begin >= start]
        media_NPD = self.model.project(self.features(images)) if images else None
        ids_1S = torch.tensor([prompt.ids[start:]], device=self.model.device)
        return self.model.embed(ids_1S, media_NPD)[0], start

    @abstractmethod
    def forward(self, batch: ForwardBatch) -> Tensor:
        """Write the keys and values of a batch; return float32 logits [N, V] at the outputs of its ranges in turn."""


class TorchRunner(ModelRunner):
    """Runs forward passes with torch, all tokens as one ragged batch."""

    def __init__(
        self,
        model: VilaForConditionalGeneration,
        features: VisionCache,
        cache: KVCache,
        fast_decoder: FastDecoder | None = None,
    ) -> None:
        """fast_decoder: runs the passes in place of the model's decoder, if given."""
        super().__init__(model, features, cache)
        self.fast_decoder = fast_decoder
        use_ragged_attention(model.get_decoder())
        # transformers passes a 4D mask on unchanged and builds none; ragged attention ignores it.
        self._no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device)

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Run one forward pass; see `ModelRunner.forward`."""
        attention = RaggedAttention(self.cache, batch)
        states_TD = self.states(self._embeds(batch), attention.positions_T, attention)
        if self.fast_decoder is None and attention.layers_called != len(self.cache.keys):
            name = type(self.model.get_decoder()).__name__
            raise ConfigError(
                f"{attention.layers_called} of {len(self.cache.keys)} blocks of {name} used the ragged attention; this "
                "architecture is not supported"
            )
        return self.logits(states_TD[batch.outputs])

    def states(self, embeds_TD: Tensor, positions_T: Tensor, attention: Attention) -> Tensor:
        """Return the last hidden states [T, D]."""
        if self.fast_decoder is not None:
            return self.fast_decoder.states(embeds_TD, positions_T, attention)
        states: Tensor = self.model.get_decoder()(
            inputs_embeds=embeds_TD[None],
            attention_mask=self._no_mask,
            position_ids=positions_T[None],
            use_cache=False,
            ragged=attention,
        ).last_hidden_state[0]
        return states

    def logits(self, states_ND: Tensor) -> Tensor:
        """Return float32 logits [N, V]."""
        if self.fast_decoder is not None:
            return self.fast_decoder.logits(states_ND)
        logits: Tensor = self.model.get_output_embeddings()(states_ND)
        return logits.float()

    def _embeds(self, batch: ForwardBatch) -> Tensor:
        """Return the embeddings [T, D] of all tokens."""
        embeds = []
        if ids := [token for one in batch.steps for token in one.ids]:
            embeds.append(self._embed_ids(ids))
        embeds += [self._embed_ids(one.ids) if one.embeds_SD is None else one.embeds_SD for one in batch.chunks]
        return torch.cat(embeds) if len(embeds) > 1 else embeds[0]

    def _embed_ids(self, ids: Sequence[int]) -> Tensor:
        embeds: Tensor = self.model.get_input_embeddings()(torch.tensor(ids, device=self.model.device))
        return embeds
