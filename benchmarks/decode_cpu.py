"""Tokens a second of one stream on a CPU, INT4 by onnxruntime beside transformers' `generate`.

    python benchmarks/decode_cpu.py --shape smollm2-135m --shape tinyllama-1.1b --threads 2 --out decode_cpu.json

Weights are random. Every contestant reads the same prompt and makes the same number of tokens, all of them counted and
the prompt's time with them; the contestants take turns, round after round, in one process. `step` is the median time of
a token after the prompt. `of memory` is bytes of weights times steps a second, over the bandwidth of reading, measured
at the start of every round. `--check N` compares the likeliest token with that of float32 activations on N
tokens that both are given.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from vila.core.machine import machine_facts, version
from vila.engine.onnx_step import OnnxDecoder
from vila.kernels.int4_layout import Int4Weight
from vila.model.config import VilaConfig
from vila.model.vila import VilaForConditionalGeneration

GIB = 2**30
# width, MLP, layers, heads, key-value heads, vocabulary, tied head
SHAPES = {
    "tiny": (128, 256, 2, 2, 1, 512, True),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True),
    "tinyllama-1.1b": (2048, 5632, 22, 32, 4, 32000, False),
    "vila-7b": (4096, 11008, 32, 32, 32, 32000, False),
}
PEER_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PROMPT = 16


@dataclass
class Contestant:
    """`run(N)` makes N tokens and returns the seconds of each step that it can tell apart."""

    name: str
    run: Callable[[int], list[float]]
    weight_bytes: int
    rates: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def take_turn(self, tokens: int, bandwidth: float) -> None:
        begin = time.perf_counter()
        steps = self.run(tokens)
        self.rates.append(tokens / (time.perf_counter() - begin))
        self.steps += steps
        step = statistics.median(steps) if steps else 1 / self.rates[-1]
        self.shares.append(self.weight_bytes / step / bandwidth)

    def row(self) -> dict[str, Any]:
        return {
            "contestant": self.name,
            "tokens_per_s": statistics.median(self.rates),
            "slowest": min(self.rates),
            "fastest": max(self.rates),
            "step_ms": 1e3 * statistics.median(self.steps) if self.steps else None,
            "weights_mb": self.weight_bytes / 1e6,
            "of_memory": statistics.median(self.shares),
        }


def text_config(shape: str) -> LlamaConfig:
    width, mlp, layers, heads, kv_heads, vocab, tied = SHAPES[shape]
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=2048,
    )


def skeleton(shape: str) -> VilaForConditionalGeneration:
    """A model with embeddings, head and norms; the Linears of its blocks have shapes and no values."""
    text, tower = text_config(shape), {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    layers, text.num_hidden_layers = text.num_hidden_layers, 0
    vision = CLIPVisionConfig(**tower, intermediate_size=32, image_size=28, patch_size=14)
    model = VilaForConditionalGeneration(VilaConfig(vision_config=vision, text_config=text, select_layer=-1)).eval()
    model.config.text_config.num_hidden_layers = layers
    for index in range(layers):
        with torch.device("meta"):
            block = LlamaDecoderLayer(model.config.text_config, index)
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight = torch.nn.Parameter(torch.ones(text.hidden_size))
        model.language_model.model.layers.append(block)
    return model


def random_weights(model: VilaForConditionalGeneration, group_size: int) -> dict[str, Int4Weight]:
    generator = torch.Generator().manual_seed(0)

    def draw(outputs: int, inputs: int) -> Int4Weight:
        groups = inputs // group_size
        codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, generator=generator)
        # Codes are uniform: with such a scale the products keep the variance of their input.
        scales = torch.full((outputs, groups), inputs**-0.5 / 4.6, dtype=torch.float16)
        return Int4Weight(codes, scales, torch.full((outputs, groups), 8, dtype=torch.uint8), group_size)

    blocks = model.get_decoder().layers
    inside = {module for module in blocks.modules() if isinstance(module, torch.nn.Linear)}
    return {n: draw(m.out_features, m.in_features) for n, m in model.named_modules() if m in inside}


def ours(shape: str, group_size: int, head_bits: int, threads: int, check: int) -> tuple[Contestant, float | None]:
    """INT4 by onnxruntime, and the share of equal likeliest tokens."""
    model = skeleton(shape)
    weights = random_weights(model, group_size)
    decoder = OnnxDecoder(model, weights, head_bits=head_bits, threads=threads)
    agree = agreement(model, weights, decoder, head_bits, check) if check else None
    prompt = model.get_input_embeddings()(torch.arange(PROMPT)[None])

    def run(tokens: int) -> list[float]:
        decoder.reset()
        token = int(decoder.prefill(prompt).argmax())
        times = []
        for _ in range(tokens - 1):
            begin = time.perf_counter()
            token = int(decoder.step(token).argmax())
            times.append(time.perf_counter() - begin)
        return times

    return Contestant(f"ours, INT4 g{group_size}, head {head_bits} bit", run, decoder.weight_bytes), agree


def agreement(model: Any, weights: Any, decoder: OnnxDecoder, head_bits: int, tokens: int) -> float:
    exact = OnnxDecoder(model, weights, head_bits=head_bits, threads=decoder.threads, int8_activations=False)
    given = torch.randint(0, model.config.text_config.vocab_size, (tokens,)).tolist()
    return statistics.mean(float(decoder.step(t).argmax() == exact.step(t).argmax()) for t in given)


def peer(shape: str, dtype: str) -> Contestant:
    """transformers' generate, which shows no single steps."""
    model = AutoModelForCausalLM.from_config(text_config(shape), dtype=PEER_DTYPES[dtype]).eval()
    model.generation_config.eos_token_id = None
    prompt = torch.arange(PROMPT)[None]

    def run(tokens: int) -> list[float]:
        model.generate(prompt, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0)
        return []

    embeddings = 0 if SHAPES[shape][-1] else model.get_input_embeddings().weight.nbytes
    read = sum(parameter.nbytes for parameter in model.parameters()) - embeddings
    return Contestant(f"transformers {dtype}", run, read)


def read_bandwidth(buffer: torch.Tensor) -> float:
    """Bytes a second of adding up a buffer much larger than the caches, the best of five."""
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - begin)
    return buffer.nbytes / min(seconds)


def measure(shape: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    contestants, agreements = [], {}
    for bits in options.head_bits:
        contestant, agree = ours(shape, options.group_size, bits, options.threads, options.check)
        contestants.append(contestant)
        agreements[contestant.name] = agree
    contestants += [peer(shape, dtype) for dtype in options.peer]
    gc.collect()
    buffer = torch.ones(int(options.buffer_gib * GIB / 4))
    bandwidths = []
    with torch.inference_mode():
        for contestant in contestants:
            contestant.run(4)
        for _ in range(options.rounds):
            bandwidths.append(read_bandwidth(buffer))
            for contestant in contestants:
                contestant.take_turn(options.tokens, bandwidths[-1])
    for contestant in contestants:
        same = agreements.get(contestant.name)
        yield {"shape": shape, **contestant.row(), "same_top1": same, "gb_per_s": statistics.median(bandwidths) / 1e9}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| shape | contestant | tokens/s | slowest-fastest | step, ms | weights, MB | of memory | same top-1 |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        step = "" if row["step_ms"] is None else f"{row['step_ms']:.2f}"
        same = "" if row["same_top1"] is None else f"{row['same_top1']:.1%}"
        spread = f"{row['slowest']:.1f}-{row['fastest']:.1f}"
        cells = (row["shape"], row["contestant"], f"{row['tokens_per_s']:.1f}", spread, step)
        lines.append("| " + " | ".join((*cells, f"{row['weights_mb']:.0f}", f"{row['of_memory']:.0%}", same)) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="one or several; default smollm2-135m")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--head-bits", type=int, nargs="+", default=[4, 8], choices=(4, 8, 32))
    parser.add_argument(
        "--peer", nargs="*", default=["bfloat16"], choices=PEER_DTYPES, help="none after the option: no peer"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check", type=int, default=0, metavar="N")
    parser.add_argument("--buffer-gib", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    facts = {**machine_facts(), "onnxruntime": version("onnxruntime"), "threads": options.threads}
    rows = [row for shape in options.shape or ["smollm2-135m"] for row in measure(shape, options)]
    print(json.dumps(facts))
    print(f"reading: {statistics.median(row['gb_per_s'] for row in rows):.1f} GB/s\n\n{table(rows)}")
    if options.out:
        options.out.write_text(json.dumps({"machine": facts, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
