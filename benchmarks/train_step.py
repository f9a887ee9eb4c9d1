"""Compare tokens per second of a training step with the Trainer of transformers and LlavaForConditionalGeneration.

    python benchmarks/train_step.py

Both models have the shape of SmolLM2-135M with a CLIP tower of ViT-S size and the same random weights, and read the
same samples in the same order. Lengths are those of stage 3 (data_packing.py); `--scale` divides the lengths of
texts, images and packed sequences. The tower is frozen, projector and LLM are trained; AdamW, gradients clipped at 1.
The peer pads batches of 16, as published; "vila, padded" does the same, "vila, packed" packs sequences. In bfloat16
the peer runs under autocast, vila with float32 master weights. The three alternate step by step in one process.
Collation is included in the time of vila and not in that of the peer; each step is one forward pass. Only real tokens
are counted, no padding.

Exits with status 1 if packed is below 1.5 times or padded below 1.0 times the tokens per second of the peer.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from data_packing import LENGTH, MICRO, draw, stage_3
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from vila.chat.tokenize import TokenizedSample, TokenSegment
from vila.core.system import system_info
from vila.core.types import Image
from vila.data.collate import collate
from vila.data.packing import PackingPolicy, PackingStreams
from vila.model.config import VilaConfig
from vila.model.modeling import VilaForConditionalGeneration
from vila.train.loss import LossModule
from vila.train.optimizer import MasterAdamW, group_parameters, select_trainable

VOCAB, PICTURE, PATCH, IMAGE = 49152, 224, 16, 49151
TEXT = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": VOCAB,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
VISION = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
TINY = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3}
LR, SUPERVISED = 1e-5, 0.6

Pixels = np.ndarray[Any, np.dtype[np.float32]]


class Data:
    """Samples of random text and images, in memory."""

    def __init__(self, number: int, scale: int) -> None:
        self.side = PICTURE // PATCH if scale == 1 else round(PICTURE / PATCH / scale**0.5)
        rng = np.random.default_rng(0)
        lengths = draw(stage_3, 0, number)
        shown = rng.random(number) >= 0.25
        self.row = LENGTH // scale
        self.samples = [
            self._sample(rng, n, max(2, length // scale), self.side**2 * int(image))
            for n, (length, image) in enumerate(zip(lengths, shown, strict=True))
        ]
        pixels = self.side * PATCH
        self.images = rng.standard_normal((number, 3, pixels, pixels), dtype=np.float32)

    def _sample(self, rng: np.random.Generator, number: int, text: int, slots: int) -> TokenizedSample:
        text = min(text, self.row - slots)
        ids = np.concatenate([np.full(slots, IMAGE), rng.integers(1, IMAGE, text)])
        is_supervised = np.arange(len(ids)) >= slots + (1 - SUPERVISED) * text
        media = (Image(str(number)),) if slots else ()
        segments = (TokenSegment(len(ids), 0, -1),)
        return TokenizedSample(str(number), ids.astype(np.int32), is_supervised, segments, IMAGE, media)

    def fetch(self, position: int) -> TokenizedSample:
        """Return the sample at a position of the endless stream."""
        return self.samples[position % len(self.samples)]

    def decode(self, position: int, sample: Any) -> Sequence[Pixels]:
        """Return the pixels of the images of a sample."""
        return [self.images[position % len(self.samples)]] if self.fetch(position).media else []


class Ours:
    """Training step of vila: packing streams, collation, loss, optimizer."""

    def __init__(self, data: Data, shape: dict[str, Any], dtype: torch.dtype, packing: str, peer: Any) -> None:
        lanes = MICRO["stage 3"] if packing == "none" else 3  # 3 packed sequences have about as many samples
        policy = PackingPolicy(max_length=data.row, look_ahead=64, packing=packing)  # type: ignore[arg-type]
        self.lanes = PackingStreams(data.fetch, lanes, policy=policy, decode=data.decode)
        self.model = VilaForConditionalGeneration(VilaConfig(**shape, image_token_id=IMAGE))
        copy_weights(peer, self.model)
        select_trainable(self.model, ["projector", "llm"])
        groups = group_parameters(self.model, lr=LR, lr_projector=None, weight_decay=0.0)
        self.optimizer = MasterAdamW(groups, beta1=0.9, beta2=0.999, max_grad_norm=1.0, dtype=dtype)
        self.model.to(dtype)
        self.objective = LossModule(self.model)

    def step(self) -> tuple[int, int]:
        """Run one update; return real tokens and padded length."""
        batch = collate(self.lanes.step())
        loss, _ = self.objective(batch, pixels=batch.pixels)
        (loss / batch.num_supervised).backward()
        self.optimizer.accumulate()
        self.optimizer.step(1.0, self.optimizer.grad_norm())
        return batch.num_tokens, batch.ids.numel()


def copy_weights(peer: LlavaForConditionalGeneration, model: VilaForConditionalGeneration) -> None:
    """Copy the weights of the peer to the model of vila."""
    model.vision_tower.load_state_dict(peer.model.vision_tower.state_dict())
    model.language_model.model.load_state_dict(peer.model.language_model.state_dict())
    theirs = peer.model.multi_modal_projector.state_dict()
    assert [t.shape for t in theirs.values()] == [t.shape for t in model.projector.state_dict().values()]
    model.projector.load_state_dict(dict(zip(model.projector.state_dict(), theirs.values(), strict=True)))
    model.tie_weights()


class Stream(IterableDataset[dict[str, Any]]):
    """Endless stream of the samples, in order, in the form that the Trainer reads."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __iter__(self) -> Iterator[dict[str, Any]]:
        position = 0
        while True:
            yield {"sample": self.data.fetch(position), "pixels": self.data.decode(position, None)}
            position += 1


def padded(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Collate a batch of the peer, padded on the right to its longest sample."""
    batch = collate([[item["sample"]] for item in items])
    pixels = [torch.from_numpy(image) for item in items for image in item["pixels"]]
    out = {"input_ids": batch.ids, "labels": batch.labels, "attention_mask": (batch.segments >= 0).long()}
    return out | ({"pixel_values": torch.stack(pixels)} if pixels else {})


class Turns(TrainerCallback):
    """Trainer callback: after each step of the peer, one step of each variant of vila; first steps are not counted."""

    def __init__(self, data: Data, ours: dict[str, Ours]) -> None:
        self.data, self.ours, self.began, self.number = data, ours, 0.0, 0
        self.spent = {name: [0, 0, 0.0] for name in ("peer", *ours)}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock of the peer."""
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the clock of the peer; run one step of each variant of vila."""
        micro = MICRO["stage 3"]
        lengths = [len(self.data.fetch(self.number * micro + n)) for n in range(micro)]
        self._note("peer", sum(lengths), max(lengths) * micro, time.perf_counter() - self.began)
        for name, one in self.ours.items():
            began = time.perf_counter()
            tokens, places = one.step()
            self._note(name, tokens, places, time.perf_counter() - began)
        self.number += 1

    def _note(self, name: str, tokens: int, places: int, seconds: float) -> None:
        if self.number:
            self.spent[name] = [a + b for a, b in zip(self.spent[name], (tokens, places, seconds), strict=True)]


def apart(data: Data, peer: LlavaForConditionalGeneration, model: VilaForConditionalGeneration) -> float:
    """Return the relative difference between the two losses of one batch."""
    items = [{"sample": data.fetch(n), "pixels": data.decode(n, None)} for n in range(4)]
    batch, given = collate([[item["sample"]] for item in items]), padded(items)
    with torch.no_grad():
        theirs = peer(**given).loss.item()
        ours = LossModule(model)(batch, pixels=given.get("pixel_values"))[0].item() / batch.num_supervised
    return abs(ours - theirs) / theirs


def measure(data: Data, dtype: torch.dtype, rounds: int, tiny: bool) -> dict[str, Any]:
    """Measure tokens per second of the three variants in one dtype."""
    text = LlamaConfig(**(TEXT | TINY | {"num_key_value_heads": 1} if tiny else TEXT))
    vision = CLIPVisionConfig(**(VISION | TINY if tiny else VISION), image_size=data.side * PATCH, patch_size=PATCH)
    torch.manual_seed(0)
    facts = {"vision_config": vision, "text_config": text}
    peer = LlavaForConditionalGeneration(
        LlavaConfig(**facts, image_token_index=IMAGE, image_seq_length=data.side**2, tie_word_embeddings=True)
    )
    peer.model.vision_tower.requires_grad_(False)
    shape = {"vision_config": vision.to_dict(), "text_config": text.to_dict()}
    make = partial(Ours, data, shape, dtype, peer=peer)
    ours = {"ours, padded": make(packing="none"), "ours, packed": make(packing="rows")}
    gap = apart(data, peer, ours["ours, padded"].model) if dtype == torch.float32 else None
    turns = Turns(data, ours)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=rounds + 1,
            per_device_train_batch_size=MICRO["stage 3"],
            learning_rate=LR,
            lr_scheduler_type="constant",
            bf16=dtype == torch.bfloat16,
            use_cpu=True,
            remove_unused_columns=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model=peer, args=arguments, train_dataset=Stream(data), data_collator=padded, callbacks=[turns]).train()
    speeds = {name: tokens / seconds for name, (tokens, _, seconds) in turns.spent.items()}
    return {
        "real tokens per second": {name: round(speed, 1) for name, speed in speeds.items()},
        "times the peer": {name: round(speeds[name] / speeds["peer"], 2) for name in ours},
        "fraction of real tokens": {
            name: round(tokens / places, 3) for name, (tokens, places, _) in turns.spent.items()
        },
        "relative difference from the loss of the peer": gap,
    }


def main() -> int:
    """Print the table; return the exit status."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--scale", type=int, default=8, help="divisor of the lengths of stage 3")
    options.add_argument("--rounds", type=int, default=3, help="measured steps per variant")
    options.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    options.add_argument("--tiny", action="store_true", help="model of two narrow layers, to test the script")
    chosen = options.parse_args()
    data = Data(512, chosen.scale)
    results = {name: measure(data, getattr(torch, name), chosen.rounds, chosen.tiny) for name in chosen.dtype}
    sizes = {"scale": chosen.scale, "rows of": data.row, "tokens per image": data.side**2, "rounds": chosen.rounds}
    sys.stdout.write(json.dumps({**results, **sizes, **system_info()}, indent=1) + "\n")
    bounds = {"ours, packed": 1.5, "ours, padded": 1.0}
    return int(any(r["times the peer"][name] < bound for r in results.values() for name, bound in bounds.items()))


if __name__ == "__main__":
    sys.exit(main())
