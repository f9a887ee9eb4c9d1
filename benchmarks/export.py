"""Measure time and peak memory of exports of a full-size model with random weights.

    python benchmarks/export.py --shape tinyllama-1.1b --format compressed-tensors --format gguf --out export.json

The model is written first, row by row, in float16 with the tower of LLaVA-1.5. Every export runs in its own process.
`peak` is the peak memory of the process above that after the imports and after opening the model, mapped pages of files
included, in bytes and as a multiple of the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from tests.export.gguf_fixtures import llama_tokenizer
from vila.core.system import system_info
from vila.core.vision_spec import VisionSpec
from vila.export.base import EXPORTS, ExportOptions, resolve_options, write_export
from vila.export.source import SafetensorsWriter, open_source
from vila.model.config import VilaConfig
from vila.model.modeling import VilaForConditionalGeneration
from vila.model.processor import VilaProcessor
from vila.model.weights import published_state_dict

MIB = 2**20
# width, MLP, layers, heads, key-value heads
SHAPES = {
    "tiny": (256, 512, 2, 4, 2),
    "tinyllama-1.1b": (2048, 5632, 22, 32, 4),
    "vila-7b": (4096, 11008, 32, 32, 32),
    "vila-13b": (5120, 13824, 40, 40, 40),
}


def main() -> None:
    options = parsed()
    if options.model:
        print(json.dumps(measured(options.model, options.format[0], options.precision, options.directory)))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=options.directory) as held:
        folder = Path(held)
        write_model(folder / "model", options.shape)
        for name in options.format or [name for name in EXPORTS if name != "tinychatengine"]:
            for precision in [options.only] if options.only else EXPORTS[name].precisions:
                row = {"format": name, "precision": precision, **in_own_process(folder, name, precision)}
                print(
                    f"{name:<22}{precision:<16}{row['seconds']:>8.1f} s  peak {row['peak'] / MIB:>6.0f} MiB, "
                    f"{row['of_largest']:.2f} of the largest tensor; wrote {row['bytes'] / MIB:.0f} MiB"
                )
                rows.append(row)
    if options.out:
        facts = {"shape": options.shape, "machine": system_info(), "threads": torch.get_num_threads(), "rows": rows}
        options.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--format", action="append", default=[])
    parser.add_argument("--only", default="", help="Measure only this precision.")
    parser.add_argument("--precision", default="")
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()), help="Directory with enough free space."
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_model(folder: Path, shape: str) -> None:
    """Write a random model of the shape in the native layout; at most one weight is in memory."""
    width, mlp, layers, heads, pairs = SHAPES[shape]
    llm = LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        rms_norm_eps=1e-5,
    )
    tower = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    spec = VisionSpec(336, 576, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), "pad").to_dict()
    config = VilaConfig(tower, llm, vision_spec=spec, template="vicuna_v1", dtype="float16")
    with torch.device("meta"):
        model = VilaForConditionalGeneration(config)
    folder.mkdir(parents=True)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    VilaProcessor(llama_tokenizer(), vision_spec=spec, template="vicuna_v1").save_pretrained(folder)
    llama_tokenizer().save_pretrained(folder)
    # The same noise for all weights: drawing it for each would take longer than the exports.
    noise = torch.empty(1 << 24).normal_(0, 0.02, generator=torch.Generator().manual_seed(0)).half()
    declared = {name: (tuple(one.shape), torch.float16) for name, one in published_state_dict(model).items()}
    with SafetensorsWriter(folder, declared) as writer:
        for name, (size, _) in declared.items():
            width = max(1, torch.Size(size[1:]).numel())
            step = len(noise) // width
            for start in range(0, size[0], step):
                rows = min(step, size[0] - start)
                writer.append(name, noise[: rows * width].view(rows, *size[1:]))


def in_own_process(folder: Path, name: str, precision: str) -> dict[str, Any]:
    words = ["--model", folder / "model", "--format", name, "--precision", precision, "--directory", folder]
    done = subprocess.run(
        [sys.executable, __file__, *map(str, words)], capture_output=True, text=True, check=False, env=None
    )
    if done.returncode:
        raise SystemExit(f"{name} {precision}: {done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measured(model: Path, name: str, precision: str, folder: Path) -> dict[str, Any]:
    """Run one export in this process, after a tiny one that triggers all imports."""
    warm = folder / "warm"
    if not warm.exists():
        write_model(warm, "tiny")
    group = 64 if "group_size" in EXPORTS[name].options else 0
    options = resolve_options(EXPORTS[name], ExportOptions(precision, group_size=group))
    write_export(open_source(warm), name, folder / "warm-out", options)
    shutil.rmtree(folder / "warm-out")
    source = open_source(model)
    largest = max(piece.bytes for piece in source.tensors.values())
    before, begin, out = reset_peak(), time.perf_counter(), folder / "out"
    write_export(source, name, out, options)
    seconds = time.perf_counter() - begin
    peak = peak_bytes() - before
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    return {"seconds": seconds, "peak": peak, "of_largest": peak / largest, "largest": largest, "bytes": size}


def reset_peak() -> int:
    """Reset the peak, where the system supports it, and return the current memory."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
