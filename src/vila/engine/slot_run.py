"""The model's side of a running batch: one forward pass over the next tokens of all requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vila.core.errors import ConfigError
from vila.engine.pictures import Picture, PictureFeatures, Prompt
from vila.engine.slot_attention import Pass, Stretch, attend_in_slots
from vila.engine.slot_pool import SlotPool
from vila.model.vila import VilaForConditionalGeneration

# T tokens of a pass  S tokens of a prompt's rest  D model width  V vocab  N wanted places

CPU_BYTES = 2 * 2**30
"""Memory for keys and values on a CPU when nobody says how many tokens; on CUDA it is half of what is free."""


def default_tokens(model: VilaForConditionalGeneration, rows: int) -> int:
    """Tokens of key-value memory: as many rows as asked for, each of the model's whole context, within the budget."""
    config = model.config.text_config
    layers, heads, width, dtype = _cache_facts(model, config)
    budget = torch.cuda.mem_get_info(model.device)[0] // 2 if model.device.type == "cuda" else CPU_BYTES
    return min(rows * int(model.config.context_length), budget // (2 * layers * heads * width * dtype.itemsize))


class SlotRun:
    """A model and its pool of keys and values."""

    def __init__(self, model: VilaForConditionalGeneration, features: PictureFeatures, tokens: int) -> None:
        """tokens: that the pool holds."""
        self.model, self.features = model, features
        attend_in_slots(model.get_decoder())
        layers, heads, width, dtype = _cache_facts(model, model.config.text_config)
        self.pool = SlotPool(layers, heads, width, tokens, dtype=dtype, device=model.device)
        # A mask of four dimensions is handed on untouched, so none is made; attention does not look at it.
        self._no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device)

    def see(self, pictures: Sequence[Picture], pixels_N3HW: Tensor) -> None:
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

    def forward(
        self,
        steps: Sequence[tuple[Stretch, int]],
        pieces: Sequence[tuple[Stretch, Tensor]],
        ends: Sequence[int],
    ) -> Tensor:
        """Logits [N, V], float32: after every step, then after each of the pieces that `ends` names.

        steps:  for each growing answer its place and its last token, in the order of rows.
        pieces: for each piece of a prompt its place and its embeddings [S, D].
        """
        embeds = [piece for _, piece in pieces]
        if steps:
            ids_B = torch.tensor([token for _, token in steps], device=self.model.device)
            embeds.insert(0, self.model.get_input_embeddings()(ids_B))
        turn = Pass(self.pool, [place for place, _ in steps], [place for place, _ in pieces])
        states_TD = self._decoder(torch.cat(embeds), turn)
        last, wanted = len(steps), list(range(len(steps)))
        for number, (place, _) in enumerate(pieces):
            last += place.count
            if number in ends:
                wanted.append(last - 1)
        logits: Tensor = self.model.get_output_embeddings()(states_TD[wanted])
        return logits.float()

    def _decoder(self, embeds_TD: Tensor, turn: Pass) -> Tensor:
        states: Tensor = self.model.get_decoder()(
            inputs_embeds=embeds_TD[None],
            attention_mask=self._no_mask,
            position_ids=turn.positions_1T,
            use_cache=False,
            slots=turn,
        ).last_hidden_state[0]
        if turn.layers_seen != len(self.pool.keys):
            raise ConfigError(
                f"{turn.layers_seen} of {len(self.pool.keys)} blocks of {type(self.model.get_decoder()).__name__} "
                f"keep to the slots of a batch; this architecture cannot be batched continuously"
            )
        return states


def _cache_facts(model: VilaForConditionalGeneration, config: Any) -> tuple[int, int, int, torch.dtype]:
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    dtype = next(model.get_input_embeddings().parameters()).dtype
    return int(config.num_hidden_layers), int(getattr(config, "num_key_value_heads", None) or heads), width, dtype
