"""The model's side of a running batch: one forward pass over the next tokens of all requests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vila.core.errors import ConfigError
from vila.engine.fast_decoder import FastDecoder
from vila.engine.kv_cache import KVCachePool
from vila.engine.ragged_attention import ForwardBatch, TokenRange, use_ragged_attention
from vila.engine.vision_cache import HashedImage, Prompt, VisionCache
from vila.model.modeling import VilaForConditionalGeneration

# T tokens of a pass  S tokens of a prompt's rest  D model width  V vocab  N wanted places

CPU_BYTES = 2 * 2**30
"""Memory for keys and values on a CPU when nobody says how many tokens; on CUDA it is half of what is free."""


def default_tokens(model: VilaForConditionalGeneration, rows: int, dtype: torch.dtype) -> int:
    """Tokens of key-value memory: as many rows as asked for, each of the model's whole context, within the budget."""
    layers, heads, width = _cache_facts(model.config.text_config)
    budget = torch.cuda.mem_get_info(model.device)[0] // 2 if model.device.type == "cuda" else CPU_BYTES
    return min(rows * int(model.config.context_length), budget // (2 * layers * heads * width * dtype.itemsize))


class ModelRunner(ABC):
    """A model and its pool of keys and values, whoever computes the passes."""

    def __init__(
        self, model: VilaForConditionalGeneration, features: VisionCache, tokens: int, dtype: torch.dtype
    ) -> None:
        """tokens: that the pool holds; dtype: in which."""
        self.model, self.features = model, features
        layers, heads, width = _cache_facts(model.config.text_config)
        self.pool = KVCachePool(layers, heads, width, tokens, dtype=dtype, device=model.device)

    def see(self, pictures: Sequence[HashedImage], pixels_N3HW: Tensor) -> None:
        """Compute the tower's features of pictures and keep them."""
        self.features.add(pictures, self.model.vision_features(pixels_N3HW.to(self.model.device)))

    def embed(self, prompt: Prompt, start: int) -> tuple[Tensor, int]:
        """Embeddings [S, D] of a prompt from place `start`, or from before it where a picture stands there.

        Returns them and the place of the first.
        """
        places = [(begin, count, picture) for (begin, count), picture in zip(prompt.runs, prompt.pictures, strict=True)]
        start = min([start, *(begin for begin, count, _ in places if begin < start < begin + count)])
        pictures = [picture for begin, _, picture in places if begin >= start]
        media_NPD = self.model.project(self.features(pictures)) if pictures else None
        ids_1S = torch.tensor([prompt.ids[start:]], device=self.model.device)
        return self.model.embed(ids_1S, media_NPD)[0], start

    @abstractmethod
    def forward(
        self,
        steps: Sequence[tuple[TokenRange, int]],
        pieces: Sequence[tuple[TokenRange, Tensor]],
        ends: Sequence[int],
    ) -> Tensor:
        """Logits [N, V], float32: after every step, then after each of the pieces that `ends` names.

        steps:  for each growing answer its place and its last token, in the order of rows.
        pieces: for each piece of a prompt its place and its embeddings [S, D].
        """


class TorchRunner(ModelRunner):
    """Passes by torch: one line of all tokens, of prompts and of answers."""

    def __init__(
        self,
        model: VilaForConditionalGeneration,
        features: VisionCache,
        tokens: int,
        fast_decoder: FastDecoder | None = None,
    ) -> None:
        """fast_decoder: computes all passes, where there is one, in place of the model's own decoder."""
        super().__init__(model, features, tokens, kv_dtype(model))
        self.fast_decoder = fast_decoder
        use_ragged_attention(model.get_decoder())
        # A mask of four dimensions is handed on untouched, so none is made; attention does not look at it.
        self._no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device)

    def forward(
        self,
        steps: Sequence[tuple[TokenRange, int]],
        pieces: Sequence[tuple[TokenRange, Tensor]],
        ends: Sequence[int],
    ) -> Tensor:
        """Logits [N, V], float32, of one pass over everything."""
        embeds = [piece for _, piece in pieces]
        if steps:
            ids_B = torch.tensor([token for _, token in steps], device=self.model.device)
            embeds.insert(0, self.model.get_input_embeddings()(ids_B))
        turn = ForwardBatch(self.pool, [place for place, _ in steps], [place for place, _ in pieces])
        embeds_TD = torch.cat(embeds)
        fast_decoder = self.fast_decoder
        states_TD = (
            fast_decoder.states(embeds_TD, turn.positions_1T[0], turn)
            if fast_decoder
            else self._decoder(embeds_TD, turn)
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

    def _decoder(self, embeds_TD: Tensor, turn: ForwardBatch) -> Tensor:
        states: Tensor = self.model.get_decoder()(
            inputs_embeds=embeds_TD[None],
            attention_mask=self._no_mask,
            position_ids=turn.positions_1T,
            use_cache=False,
            forward_batch=turn,
        ).last_hidden_state[0]
        if turn.layers_called != len(self.pool.keys):
            raise ConfigError(
                f"{turn.layers_called} of {len(self.pool.keys)} blocks of {type(self.model.get_decoder()).__name__} "
                f"keep to the slots of a batch; this architecture cannot be batched continuously"
            )
        return states


def kv_dtype(model: VilaForConditionalGeneration) -> torch.dtype:
    """Of the keys and values that torch computes."""
    return next(model.get_input_embeddings().parameters()).dtype


def _cache_facts(config: Any) -> tuple[int, int, int]:
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return int(config.num_hidden_layers), int(getattr(config, "num_key_value_heads", None) or heads), width
