"""Compare samples per second of the data loader with a plain DataLoader and the processors of transformers.

    python benchmarks/data_loading.py --work /tmp/data_loading

Writes synthetic images (640 x 480 JPEG) and ShareGPT4V-like conversations. The peer is a torch DataLoader over a
dataset that pads each image to a square as the original code does, runs CLIPImageProcessor, and tokenises with the
Llama tokenizer: the full prompt, then each round for the label mask. Both use the same number of worker processes with
one thread each. They alternate; the consumer only waits for the next batch. Pixels are compared bit by bit. The CPU
time of all processes per sample is printed too; it depends less on other load of the machine. Exits with status 1 if
pixels differ or if vila is less than 1.5 times as fast.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PilImage
from PIL import ImageFilter
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vila.chat.tokenize import SpanTokenizer
from vila.core.system import system_info
from vila.core.vision_spec import VisionSpec
from vila.data.collate import collate
from vila.data.dataset import DatasetEntry, SampleReader, open_mixture
from vila.data.packing import PackingPolicy
from vila.data.workers import WorkerStreams
from vila.media.image import open_image
from vila.media.transform import pixels

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SPEC = VisionSpec(336, 576, MEAN, STD, "pad")
TOKENIZER = Path(__file__).parents[1] / "tests/golden/tokenizers/vicuna_v15_legacy_false"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
WORDS = ["the", "a", "picture", "shows", "two", "people", "near", "an", "old", "red", "bicycle", "under", "trees"]
FACTOR = 1.5


def write_data(work: Path, number: int) -> Path:
    """Write `number` conversations about one image each, as LLaVA JSON."""
    path = work / f"data-{number}.json"
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    (work / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(number):
        coarse = PilImage.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((640, 480))
        grain = PilImage.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)).filter(
            ImageFilter.GaussianBlur(1)
        )
        PilImage.blend(coarse, grain, 0.25).save(work / "images" / f"{index}.jpg", quality=90)
        turns = []
        for turn in range(1 + index % 3):
            question, answer = (" ".join(rng.choice(WORDS, size=int(rng.lognormal(np.log(m), 0.5)))) for m in (12, 90))
            turns += [
                {"from": "human", "value": ("<image>\n" if not turn else "") + question + "x?"},
                {"from": "gpt", "value": answer + " x."},
            ]
        records.append({"id": str(index), "image": f"images/{index}.jpg", "conversations": turns})
    path.write_text(json.dumps(records))
    return path


class Peer(Dataset):
    """Plain dataset: records in memory, processors of transformers."""

    def __init__(self, path: Path) -> None:
        self.root, self.records = path.parent, json.loads(path.read_text())
        self.tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        record = self.records[index]
        image = PilImage.open(self.root / record["image"]).convert("RGB")
        side = max(image.size)
        square = PilImage.new("RGB", (side, side), tuple(int(x * 255) for x in self.processor.image_mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        values = self.processor.preprocess(square, return_tensors="pt")["pixel_values"][0]
        turns = [turn["value"] for turn in record["conversations"]]
        rounds = [f"USER: {q} ASSISTANT: " for q in turns[::2]]
        prompt = SYSTEM + " " + "".join(f"{r}{a}</s>" for r, a in zip(rounds, turns[1::2], strict=True))
        ids = torch.tensor(self.tokenizer(prompt).input_ids)
        labels, place = ids.clone(), 1
        for question, answer in zip(rounds, turns[1::2], strict=True):
            whole = len(self.tokenizer(f"{question}{answer}</s>").input_ids)
            labels[place : place + len(self.tokenizer(question).input_ids)] = -100
            place += whole
        return {"ids": ids, "labels": labels, "pixels": values}

    @staticmethod
    def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "ids": pad([sample["ids"] for sample in samples], True, 0),
            "labels": pad([sample["labels"] for sample in samples], True, -100),
            "pixels": torch.stack([sample["pixels"] for sample in samples]),
        }


def reader_of(path: Path) -> SampleReader:
    """Return the reader of vila for the same file."""
    tokenizer = SpanTokenizer(AutoTokenizer.from_pretrained(TOKENIZER))
    return SampleReader(open_mixture([DatasetEntry("llava_json", str(path))], 0), "vicuna_v1", tokenizer, SPEC)


def processor_seconds() -> float:
    """Return the CPU seconds of this process and its running workers."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / ticks
    return total


def ours_per_second(reader: SampleReader, workers: int, samples: int) -> tuple[float, float]:
    """Return samples per second and CPU ms per sample after the first step; packed sequences of 4096 tokens."""
    policy = PackingPolicy(max_length=4096, look_ahead=64)
    lanes = WorkerStreams(reader, 2 * workers, policy=policy, workers=workers, start_method="fork")
    try:
        lanes.step()
        shown, began, spent = 0, time.perf_counter(), processor_seconds()
        while shown < samples:
            rows = lanes.step()
            for start in range(0, len(rows), 2):
                collate(rows[start : start + 2])
            shown += sum(len(row) for row in rows)
        return shown / (time.perf_counter() - began), (processor_seconds() - spent) / shown * 1e3
    finally:
        lanes.close()


def peer_per_second(peer: Peer, workers: int, samples: int) -> tuple[float, float]:
    """Return the same of the peer after its first batch; batches of eight."""
    loader = DataLoader(peer, 8, shuffle=True, num_workers=workers, collate_fn=Peer.collate, persistent_workers=True)
    shown, began, spent = 0, 0.0, 0.0
    while shown < samples:
        for batch in loader:
            if not began:
                began, spent = time.perf_counter(), processor_seconds()
                continue
            shown += len(batch["ids"])
    return shown / (time.perf_counter() - began), (processor_seconds() - spent) / shown * 1e3


def milliseconds(reader: SampleReader, number: int) -> dict[str, float]:
    """Return the milliseconds of each stage for one sample in one process."""
    spent: dict[str, float] = dict.fromkeys(("read", "render and tokenise", "decode", "square, resize, normalise"), 0.0)
    for position in range(number):
        marks = [time.perf_counter()]
        part, sample = reader.mixture[position]
        marks.append(time.perf_counter())
        reader.tokenize(part, sample)
        marks.append(time.perf_counter())
        opened = [open_image(image) for image in sample.media]
        marks.append(time.perf_counter())
        for image in opened:
            pixels(image, SPEC)
        marks.append(time.perf_counter())
        for name, start, end in zip(spent, marks, marks[1:], strict=False):
            spent[name] += end - start
    return {name: round(seconds / number * 1e3, 2) for name, seconds in spent.items()}


def same_pixels(reader: SampleReader, peer: Peer, number: int) -> bool:
    """Return whether the pixels of the first samples are bit-identical."""
    source = reader.mixture.datasets[0].source
    return all(
        np.array_equal(pixels(open_image(source[i].media[0]), SPEC), peer[i]["pixels"].numpy()) for i in range(number)
    )


def main() -> int:
    """Print the figures; return the exit status."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--work", type=Path, required=True)
    options.add_argument("--samples", type=int, default=600, help="samples per measurement")
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--rounds", type=int, default=3)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    path = write_data(chosen.work, chosen.samples)
    reader, peer = reader_of(path), Peer(path)
    equal = same_pixels(reader, peer, 32)
    speeds: dict[str, list[tuple[float, float]]] = {"ours": [], "DataLoader": []}
    for _ in range(chosen.rounds):
        speeds["ours"].append(ours_per_second(reader, chosen.workers, chosen.samples))
        speeds["DataLoader"].append(peer_per_second(peer, chosen.workers, chosen.samples))
    median = {name: statistics.median(value for value, _ in values) for name, values in speeds.items()}
    busy = {name: statistics.median(value for _, value in values) for name, values in speeds.items()}
    ratio = median["ours"] / median["DataLoader"]
    facts: dict[str, Any] = {
        "samples_per_second": {name: round(value, 1) for name, value in median.items()},
        "samples_per_second_per_worker": {name: round(value / chosen.workers, 1) for name, value in median.items()},
        "ratio": round(ratio, 2),
        "ratios": [round(a[0] / b[0], 2) for a, b in zip(*speeds.values(), strict=True)],
        "processor_milliseconds_a_sample": {name: round(value, 2) for name, value in busy.items()},
        "ratio_of_processor_time": round(busy["DataLoader"] / busy["ours"], 2),
        "pixels_bit_identical": equal,
        "milliseconds_a_sample": milliseconds(reader, 100),
        "workers": chosen.workers,
        **system_info(),
    }
    sys.stdout.write(json.dumps(facts, indent=1) + "\n")
    return int(not equal or ratio < FACTOR)


if __name__ == "__main__":
    sys.exit(main())
