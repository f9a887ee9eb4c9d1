"""Measure load time and memory of checkpoints, and of transformers on the same weights.

    python benchmarks/loading.py --work /tmp/loading

Writes a random checkpoint (TinyLlama-1.1B with CLIP-L/336) in every layout, loads each in its own process, reads every
weight, and compares the peak resident memory above that after the imports with the size of the weights. Exits with
status 1 if a limit is exceeded: 1.02 x the weights in the dtype of the files; the weights and one tensor if they are
cast; 1.1 x the time of transformers for the same weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

SAME_TYPE, TIME = 1.02, 1.1
SIZES = {
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
             "num_key_value_heads": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32},
}  # fmt: skip
TOWER = "openai/clip-vit-large-patch14-336"


def parts(size: str) -> tuple:
    """Return config and processor of the random model."""
    from functools import partial

    from transformers import AutoTokenizer, LlamaConfig

    from vila.model.config import build_vila_config
    from vila.model.layouts.build_config import build_settings
    from vila.model.layouts.tower_files import known_tower

    folder = Path(__file__).parents[1] / "tests/golden/tokenizers/vicuna_v15_legacy_false"
    settings, files = build_settings(
        llm=LlamaConfig(**SIZES[size], vocab_size=32000, max_position_embeddings=4096), tower=known_tower(TOWER),
        tokenizer_folder=folder, load_tokenizer=partial(AutoTokenizer.from_pretrained, folder),
        projector="mlp2x_gelu", select_layer=-2, select_feature="patch", image_mode="pad", template="vicuna_v1",
        vision_source=TOWER,
    )  # fmt: skip
    processor = files.load()
    return build_vila_config(settings, processor.image_token_id), processor


def write_checkpoints(work: Path, size: str, layouts: list[str]) -> None:
    """Write the same random bfloat16 weights in each layout; `llava-v1-bin` is written by torch.save."""
    import torch

    from vila.model.layouts.base import to_layout_name
    from vila.model.layouts.llava_v1 import PREFIXES
    from vila.model.loading import save_model
    from vila.model.modeling import VilaForConditionalGeneration

    missing = [layout for layout in layouts if not (work / size / layout).exists()]
    if not missing:
        return
    config, processor = parts(size)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = VilaForConditionalGeneration(config)
    model.config.dtype = torch.bfloat16
    if size == "7b":
        write_in_shards(model, processor, work / size / "llava-v1")
        return
    model = model.to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    for layout in missing:
        print(f"writing {work / size / layout}", file=sys.stderr)
        if layout == "llava-v1-bin":
            save_model(model, processor, work / size / layout, "llava-v1")
            (work / size / layout / "model.safetensors").unlink()
            state = {to_layout_name(name, PREFIXES): tensor for name, tensor in model.state_dict().items()}
            torch.save(state, work / size / layout / "pytorch_model.bin")
        else:
            save_model(model, processor, work / size / layout, layout)


def write_in_shards(model, processor, folder: Path, shard_size: int = 2 * 10**9) -> None:
    """Write a llava-v1 checkpoint shard by shard: it is too large to be in memory twice."""
    import torch
    from safetensors.torch import save_file

    from vila.model.layouts import llava_v1
    from vila.model.layouts.base import to_layout_name
    from vila.model.layouts.tokenizer_files import write_tokenizer

    folder.mkdir(parents=True)
    shards, filled = [[]], 0
    for name, tensor in model.state_dict().items():
        if filled + tensor.nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append((to_layout_name(name, llava_v1.PREFIXES), tensor.shape))
        filled += tensor.nbytes
    where = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        print(f"writing {folder / file}", file=sys.stderr)
        tensors = {name: torch.empty(shape).uniform_(-0.02, 0.02) for name, shape in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    facts = llava_v1._config(model.config, processor, TOWER)
    (folder / "config.json").write_text(json.dumps(facts))
    write_tokenizer(processor.tokenizer, folder, "vicuna_v1")


MEASURE = """
import json, os, sys, time
path, peer, dtype = sys.argv[1:]
import torch, transformers
if peer == "transformers":
    from transformers import LlavaForConditionalGeneration
else:
    from vila.model.loading import load_model

def memory(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

with open("/proc/self/clear_refs", "w") as stream:
    stream.write("5")
before, start = memory("VmRSS"), time.perf_counter()
if peer == "transformers":
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype)
else:
    model, _ = load_model(path, dtype=dtype)
for tensor in model.state_dict().values():
    tensor.view(torch.uint8).view(-1)[::2048].sum() if tensor.dim() else None
seconds = time.perf_counter() - start
sizes = [t.numel() * t.element_size() for t in {t.data_ptr(): t for t in model.state_dict().values()}.values()]
print(json.dumps({"seconds": seconds, "peak": memory("VmHWM") - before, "weights": sum(sizes), "largest": max(sizes)}))
"""


def measure(path: Path, peer: str, dtype: str) -> dict[str, float]:
    """Measure one load in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), peer, dtype], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True, help="directory of the checkpoints, which are kept")
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--layouts", nargs="+", default=["llava-hf", "native", "llava-v1", "llava-v1-bin", "vila-v15"])
    args = parser.parse_args()
    write_checkpoints(args.work, args.size, args.layouts)
    rows, broken = [], []
    for dtype in args.dtypes if args.size == "1.1b" else ["bfloat16"]:
        runs = [(layout, "vila") for layout in args.layouts]
        if "llava-hf" in args.layouts:
            runs.insert(0, ("llava-hf", "transformers"))
        taken: dict[tuple[str, str], list[dict[str, float]]] = {run: [] for run in runs}
        # Interleaved, so that other load of the machine affects all of them.
        for _ in range(args.repeats):
            for run in runs:
                taken[run].append(measure(args.work / args.size / run[0], run[1], dtype))
        peer = min(r["seconds"] for r in taken.get(("llava-hf", "transformers"), [{"seconds": 1e9}]))
        for (layout, who), results in taken.items():
            weights, largest = results[0]["weights"], results[0]["largest"]
            peak = max(r["peak"] for r in results)
            # The minimum: other load of the machine only adds to it.
            seconds, middle = (f(r["seconds"] for r in results) for f in (min, statistics.median))
            rows.append((who, layout, dtype, weights / 1e9, peak / weights, seconds, middle, seconds / peer))
            if who == "vila":
                # Casting moves one tensor of the files at a time; two bytes each, as they are bfloat16.
                bound = SAME_TYPE * weights if dtype == "bfloat16" else weights + largest / 2 + 0.02 * weights
                if peak > bound:
                    broken.append(f"{layout} as {dtype}: peak {peak / 1e9:.2f} GB, bound {bound / 1e9:.2f} GB")
                if seconds > TIME * peer:
                    broken.append(f"{layout} as {dtype}: {seconds:.2f} s, transformers {peer:.2f} s")
    print(
        "| loader | layout | dtype | weights GB | peak / weights | seconds, least | median | least / transformers |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for who, layout, dtype, gb, ratio, *times in rows:
        least, middle, relative = (f"{value:.2f}" for value in times)
        print(f"| {who} | {layout} | {dtype} | {gb:.2f} | {ratio:.3f} | {least} | {middle} | {relative} |")
    for line in broken:
        print(f"bound broken: {line}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
