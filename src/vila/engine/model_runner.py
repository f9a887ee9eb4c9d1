"""Model runners of the scheduler: one forward pass over the next tokens of all requests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vila.core.errors import ConfigError
from vila.engine.fast_decoder import FastDecoder
from vila.engine.kv_cache_pool import KVCachePool
from vila.engine.ragged_attention import ForwardBatch, TokenRange, use_ragged_attention
from vila.engine.vision_cache import HashedImage, Prompt, VisionCache
from vila.model.modeling import VilaForConditionalGeneration

# T tokens of a pass  S tokens of a prompt  D model width  V vocab  N positions with logits

CPU_BYTES = 2 * 2**30
"""Default size of the KV cache on a CPU; on CUDA it is half of the free memory."""


def default_tokens(model: VilaForConditionalGeneration, rows: int, dtype: torch.dtype) -> int:
    """Return the default KV cache capacity in tokens: the context length times `rows`, within the memory budget."""
    layers, heads, width = _cache_shape(model.config.text_config)
    budget = torch.cuda.mem_get_info(model.device)[0] // 2 if model.device.type == "cuda" else CPU_BYTES
    return min(rows * int(model.config.context_length), budget // (2 * layers * heads * width * dtype.itemsize))


class ModelRunner(ABC):
    """A model with its KV cache pool; subclasses run the forward passes."""

    def __init__(
        self, model: VilaForConditionalGeneration, features: VisionCache, tokens: int, dtype: torch.dtype
    ) -> None:
        """tokens, dtype: capacity and dtype of the KV cache."""
        self.model, self.features = model, features
        layers, heads, width = _cache_shape(model.config.text_config)
        self.pool = KVCachePool(layers, heads, width, tokens, dtype=dtype, device=model.device)

    def encode(self, images: Sequence[HashedImage], pixels_N3HW: Tensor) -> None:
        """Compute the tower features of images and add them to the vision cache."""
        self.features.add(images, self.model.vision_features(pixels_N3HW.to(self.model.device)))

    def embed(self, prompt: Prompt, start: int) -> tuple[Tensor, int]:
        """Return the embeddings [S, D] of a prompt from position `start`, and the position of the first.

        If `start` is inside an image, the embeddings begin with that image.
        """
        places = [(begin, count, image) for (begin, count), image in zip(prompt.runs, prompt.images, strict=True)]
        start = min([start, *(begin for begin, count, _ in places if begin < start < begin + count)])
        images = [image for begin, _, image in places if begin >= start]
        media_NPD = self.model.project(self.features(images)) if images else None
        ids_1S = torch.tensor([prompt.ids[start:]], device=self.model.device)
        return self.model.embed(ids_1S, media_NPD)[0], start

    @abstractmethod
    def forward(
        self,
        steps: Sequence[tuple[TokenRange, int]],
        pieces: Sequence[tuple[TokenRange, Tensor]],
        ends: Sequence[int],
    ) -> Tensor:
        """Return float32 logits [N, V] after every decode step, then after each prefill chunk in `ends`.

        steps:  token range and last token of each decode step, in order of rows.
        pieces: token range and embeddings [S, D] of each prefill chunk.
        ends:   indices of the chunks that complete their prompt.
        """


class TorchRunner(ModelRunner):
    """Runs forward passes with torch, all tokens as one ragged batch."""

    def __init__(
        self,
        model: VilaForConditionalGeneration,
        features: VisionCache,
        tokens: int,
        fast_decoder: FastDecoder | None = None,
    ) -> None:
        """fast_decoder: runs the passes in place of the model's decoder, if given."""
        super().__init__(model, features, tokens, kv_dtype(model))
        self.fast_decoder = fast_decoder
        use_ragged_attention(model.get_decoder())
        # transformers passes a 4D mask on unchanged and builds none; ragged attention ignores it.
        self._no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device)

    def forward(
        self,
        steps: Sequence[tuple[TokenRange, int]],
        pieces: Sequence[tuple[TokenRange, Tensor]],
        ends: Sequence[int],
    ) -> Tensor:
        """Run one forward pass; see `ModelRunner.forward`."""
        embeds = [piece for _, piece in pieces]
        if steps:
            ids_B = torch.tensor([token for _, token in steps], device=self.model.device)
            embeds.insert(0, self.model.get_input_embeddings()(ids_B))
        batch = ForwardBatch(self.pool, [place for place, _ in steps], [place for place, _ in pieces])
        embeds_TD = torch.cat(embeds)
        fast_decoder = self.fast_decoder
        states_TD = (
            fast_decoder.states(embeds_TD, batch.positions_1T[0], batch)
            if fast_decoder
            else self._decoder(embeds_TD, batch)
        )
        last, wanted = len(steps), list(range(len(steps)))
        for number, (place, _) in enumerate(pieces):
            last += place.count
            if number in ends:
                wanted.append(last - 1)
        if fast_decoder is not None:
            return fast_decoder.logits(states_TD[wanted])
        logits: Tensor = self.model.get_output_embeddings()(states_TD[wanted])
        return logits.float()

    def _decoder(self, embeds_TD: Tensor, batch: ForwardBatch) -> Tensor:
        states: Tensor = self.model.get_decoder()(
            inputs_embeds=embeds_TD[None],
            attention_mask=self._no_mask,
            position_ids=batch.positions_1T,
            use_cache=False,
            forward_batch=batch,
        ).last_hidden_state[0]
        if batch.layers_called != len(self.pool.keys):
            raise ConfigError(
                f"{batch.layers_called} of {len(self.pool.keys)} blocks of {type(self.model.get_decoder()).__name__} "
                f"used the ragged attention; this architecture does not support continuous batching"
            )
        return states


def kv_dtype(model: VilaForConditionalGeneration) -> torch.dtype:
    """Return the dtype of the keys and values that torch computes."""
    return next(model.get_input_embeddings().parameters()).dtype


def _cache_shape(config: Any) -> tuple[int, int, int]:
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return int(config.num_hidden_layers), int(getattr(config, "num_key_value_heads", None) or heads), width
