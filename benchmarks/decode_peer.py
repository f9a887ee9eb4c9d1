"""Compare tokens per second of one CPU stream with llama.cpp and `generate` of transformers.

    python benchmarks/decode_peer.py --shape smollm --threads 2 --peer PYTHON --transformers bfloat16 float32

PYTHON is the interpreter of an environment with llama-cpp-python, which runs in a separate process. Weights are random
and of the same sizes: group-wise INT4 in vila, Q4_0 in llama.cpp, LM heads with equal bits. Every engine generates the
same number of tokens after prompts of the same length; the engines alternate in each round. `tokens/s` is the decode
rate without the first token, sampling included. `generate` reports no times per token: its figure counts all tokens and
includes the prefill.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from vila.bench.decode import Load, Subject, read_bandwidth, subject_of, time_steps
from vila.bench.model_shapes import SHAPES, Shape, random_model, text_config
from vila.core.system import system_info, version
from vila.engine.kv_cache import KVCachePool
from vila.engine.scheduler import Scheduler
from vila.engine.vision_cache import Prompt

_Q4_0_BYTES, _Q8_0_BYTES, _BLOCK = 18, 34, 32


@dataclass
class EngineUnderTest:
    """Engine to measure. `run` returns the seconds of each step of an answer, or total time / tokens."""

    name: str
    run: Callable[[], list[float]]
    step_bytes: int
    rates: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def take_turn(self, bandwidth: float) -> None:
        times = self.run()
        self.rates.append(len(times) / sum(times))
        self.shares.append(self.step_bytes * self.rates[-1] / bandwidth)

    def row(self) -> dict[str, Any]:
        return {
            "engine": self.name,
            "tokens_per_s": statistics.median(self.rates),
            "slowest": min(self.rates),
            "fastest": max(self.rates),
            "of_memory": statistics.median(self.shares),
        }


def ours(subject: Subject, prompt: int, tokens: int) -> EngineUnderTest:
    load = Load(context=prompt, batch=1, tokens=tokens, runs=1, check=0)
    runner, budget = subject.new_runner(1)
    scheduler = Scheduler(runner, KVCachePool(runner.cache, budget), prompt)
    given = [Prompt([10 + place % 200 for place in range(prompt)])]

    @torch.inference_mode()
    def run() -> list[float]:
        return time_steps(scheduler, given, load)[1]

    return EngineUnderTest(f"vila {subject.precision}, {subject.backend}", run, subject.step_bytes)


def transformers_peer(shape: Shape, dtype: str, prompt: int, tokens: int) -> EngineUnderTest:
    config = text_config(shape, 2048)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    ids = torch.arange(10, 10 + prompt)[None]

    def run() -> list[float]:
        begin = time.perf_counter()
        model.generate(ids, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0)
        return [(time.perf_counter() - begin) / tokens] * tokens

    unread = 0 if shape.tied else model.get_input_embeddings().weight.nbytes
    return EngineUnderTest(f"transformers {dtype}", run, sum(p.nbytes for p in model.parameters()) - unread)


def llama_peer(
    python: Path, model: Path, read: int, threads: int, prompt: int, tokens: int
) -> tuple[EngineUnderTest, dict[str, str]]:
    command = [str(python), str(Path(__file__).with_name("decode_llama.py")), str(model), str(threads)]
    process = subprocess.Popen(
        [*command, str(prompt + tokens)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    asked, answered = process.stdin, process.stdout

    def run() -> list[float]:
        asked.write(f"{prompt} {tokens}\n")
        asked.flush()
        return json.loads(answered.readline())["steps"]

    facts = json.loads(answered.readline())
    return EngineUnderTest(f"llama.cpp Q4_0, llama-cpp-python {facts['version']}", run, read), facts


def write_gguf(shape: Shape, head_bits: int, path: Path) -> int:
    """Write a model with random weights; return the bytes that a decode step reads."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.mlp)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    _add_vocabulary(writer, shape.vocab)
    draw = np.random.default_rng(0)
    read = 0

    def matrix(name: str, outputs: int, inputs: int, bits: int = 4) -> int:
        kind = gguf.GGMLQuantizationType.Q4_0 if bits == 4 else gguf.GGMLQuantizationType.Q8_0
        size = _Q4_0_BYTES if bits == 4 else _Q8_0_BYTES
        blocks = draw.integers(0, 256, (outputs, inputs // _BLOCK, size), dtype=np.uint8)
        scale = np.float16(inputs**-0.5 / (4.6 if bits == 4 else 74))
        blocks[..., :2] = np.frombuffer(scale.tobytes(), np.uint8)
        writer.add_tensor(f"{name}.weight", blocks.reshape(outputs, -1), raw_dtype=kind)
        return blocks.nbytes

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(shape.width, np.float32))

    kv_width = shape.width // shape.heads * shape.kv_heads
    embeddings = matrix("token_embd", shape.vocab, shape.width, head_bits)
    read += embeddings if shape.tied else matrix("output", shape.vocab, shape.width, head_bits)
    norm("output_norm")
    for layer in range(shape.layers):
        for name in ("attn_norm", "ffn_norm"):
            norm(f"blk.{layer}.{name}")
        for name, outputs, inputs in (
            ("attn_q", shape.width, shape.width),
            ("attn_k", kv_width, shape.width),
            ("attn_v", kv_width, shape.width),
            ("attn_output", shape.width, shape.width),
            ("ffn_gate", shape.mlp, shape.width),
            ("ffn_up", shape.mlp, shape.width),
            ("ffn_down", shape.width, shape.mlp),
        ):
            read += matrix(f"blk.{layer}.{name}", outputs, inputs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Add a name for every token id; llama.cpp requires them."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [f"w{number}" for number in range(size - len(special) - len(pieces))]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, *pieces, *words])
    writer.add_token_scores([0.0] * size)
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * len(pieces), *[kinds.NORMAL] * len(words)]
    writer.add_token_types([int(kind) for kind in types])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| shape | engine | tokens/s | slowest-fastest | of memory limit |", "|---|---|---|---|---|"]
    for row in rows:
        spread = f"{row['slowest']:.1f}-{row['fastest']:.1f}"
        cells = (row["shape"], row["engine"], f"{row['tokens_per_s']:.1f}", spread, f"{row['of_memory']:.0%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm")
    parser.add_argument("--group-size", type=int, default=0, help="default: 128, or 64 where 128 does not fit")
    parser.add_argument("--head-bits", type=int, default=8, choices=(4, 8))
    parser.add_argument("--activation-bits", type=int, nargs="+", default=[8], choices=(8, 16, 32))
    parser.add_argument("--plain", nargs="*", default=[], choices=("float32", "bfloat16"), help="vila, not quantized")
    parser.add_argument("--transformers", nargs="*", default=[], choices=("float32", "bfloat16"))
    parser.add_argument("--peer", type=Path, help="interpreter with llama-cpp-python")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def contestants_of(options: argparse.Namespace, folder: Path, facts: dict[str, Any]) -> list[EngineUnderTest]:
    shape, sizes = SHAPES[options.shape], (options.prompt, options.tokens)
    group = options.group_size or (64 if shape.width % 128 else 128)
    model = random_model(shape, torch.float32, group_size=group)
    found = [
        ours(subject_of(model, shape.title, backend="onnx", head_bits=options.head_bits, activation_bits=bits), *sizes)
        for bits in options.activation_bits
    ]
    for dtype in options.plain:
        # float32 runs on onnxruntime, bfloat16 on torch: the faster backend of each.
        backend = "onnx" if dtype == "float32" else "torch"
        found.append(ours(subject_of(random_model(shape, getattr(torch, dtype)), shape.title, backend=backend), *sizes))
    found += [transformers_peer(shape, dtype, *sizes) for dtype in options.transformers]
    if options.peer:
        path = folder / "random.gguf"
        read = write_gguf(shape, options.head_bits, path)
        engine, facts["llama.cpp"] = llama_peer(options.peer, path, read, options.threads, *sizes)
        found.append(engine)
    return found


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    facts: dict[str, Any] = {
        **system_info(),
        "onnxruntime": version("onnxruntime"),
        "threads": options.threads,
        "head_bits": options.head_bits,
    }
    with tempfile.TemporaryDirectory() as folder:
        engines = contestants_of(options, Path(folder), facts)
        for engine in engines:
            engine.run()
        bandwidths = []
        for _ in range(options.rounds):
            bandwidths.append(read_bandwidth("cpu"))
            for engine in engines:
                engine.take_turn(bandwidths[-1])
    rows = [{"shape": options.shape, **engine.row()} for engine in engines]
    print(json.dumps(facts))
    print(f"reading: {statistics.median(bandwidths) / 1e9:.1f} GB/s\n\n{table(rows)}")
    print("\n".join(f"vila / {r['engine']}: {rows[0]['tokens_per_s'] / r['tokens_per_s']:.2f}x" for r in rows[1:]))
    if options.out:
        options.out.write_text(json.dumps({"machine": facts, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
