"""Compare the training speed of the starter's stage 3 with a plain padded loop on the same model, in one run.

    python benchmarks/training_speed.py runs/starter --steps 12

The peer is a minimal script: one question per sample, right-padded batches of 16, the vision tower in every step,
logits at every position, bf16 autocast, torch AdamW. Both train on the same questions and alternate. The figures are
questions and real tokens per second, and their ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from vila.chat.templates import find_template
from vila.chat.tokenize import IGNORE, tokenize_sample
from vila.config.load import load_recipe
from vila.core.system import system_info
from vila.core.types import Sample
from vila.data.collate import collate
from vila.model.loading import choose_dtype, load_model
from vila.train.build import build


class PaddedLoop:
    """Plain loop: one question per sample, padded batches."""

    def __init__(self, folder: Path, samples: list[Sample], batch: int) -> None:
        self.model, self.processor = load_model(folder / "2_pretrain" / "model", dtype="float32")
        self.model.vision_tower.requires_grad_(False)
        self.model.language_model.train()
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.adam = torch.optim.AdamW(learning, lr=1e-5)
        template = find_template("starter_qa")
        singles = [Sample(f"{s.id}/{n}", talk) for s in samples for n, talk in enumerate(s.conversations())]
        rows = [tokenize_sample(s, template, self.processor.span_tokenizer, self.processor.count) for s in singles]
        self.batches = [rows[i : i + batch] for i in range(0, len(rows), batch)]

    def step(self) -> tuple[int, int]:
        """Run one update; return its numbers of questions and real tokens."""
        rows = self.batches.pop(0)
        batch = collate([[row] for row in rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=choose_dtype("auto") is torch.bfloat16):
            pixels = self.processor.pixels(list(batch.media))
            padding = (batch.segments >= 0).long()
            logits = self.model(
                input_ids=batch.ids, pixel_values=pixels, attention_mask=padding, use_cache=False
            ).logits
        targets = batch.labels[:, 1:]
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE
        )
        loss.backward()
        self.adam.step()
        self.adam.zero_grad()
        return len(rows), batch.num_tokens


def main() -> int:
    """Measure both, alternating."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("run", type=Path, help="directory of a finished quickstart")
    options.add_argument("--steps", type=int, default=12)
    options.add_argument("--batch", type=int, default=16, help="questions in a batch of the padded loop")
    chosen = options.parse_args()
    saved = (chosen.run / "3_sft" / "recipe.yaml").resolve()
    recipe = load_recipe(str(saved), [f"output.dir={chosen.run / 'speed'}"])
    ours = build(recipe)
    source = ours.mixture.datasets[0].source
    peer = PaddedLoop(chosen.run, [source[i] for i in range(chosen.steps * chosen.batch // 4)], chosen.batch)
    speeds: dict[str, list[tuple[float, float]]] = {"ours": [], "padded": []}
    for number in range(chosen.steps + 2):
        for name in speeds:
            began = time.perf_counter()
            questions, tokens = _ours(ours) if name == "ours" else peer.step()
            seconds = time.perf_counter() - began
            if number >= 2:
                speeds[name].append((questions / seconds, tokens / seconds))
    out = {
        name: [round(statistics.median(column), 2) for column in zip(*rows, strict=True)]
        for name, rows in speeds.items()
    }
    ratio = [round(a / b, 2) for a, b in zip(out["ours"], out["padded"], strict=True)]
    facts = {"questions_per_second, tokens_per_second": out, "ratio": ratio, "steps": chosen.steps, **system_info()}
    sys.stdout.write(json.dumps(facts, indent=1) + "\n")
    return 0


def _ours(run) -> tuple[int, int]:  # type: ignore[no-untyped-def]
    before = run.trainer.progress
    shown: list[int] = []
    real = run.trainer.data.streams.step

    def counted():  # type: ignore[no-untyped-def]
        rows = real()
        # Every branch is a question; text-only samples count as one.
        shown.append(sum(max(1, len(sample.segments) - 1) for row in rows for sample in row))
        return rows

    run.trainer.data.streams.step = counted
    run.trainer.step()
    run.trainer.data.streams.step = real
    return shown[0], run.trainer.progress.tokens - before.tokens


if __name__ == "__main__":
    sys.exit(main())
