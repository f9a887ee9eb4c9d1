"""Measure the peak memory of a process that loads a checkpoint and answers one question.

    python benchmarks/memory.py runs/starter/model-int4 runs/starter/model --threads 2

Every checkpoint is measured in a process of its own, which answers a text prompt of `--prompt-tokens` tokens with
`--tokens` new tokens. `peak` is the peak resident memory of the process, `imports` that after `import vila` and torch.
The bound is 1.15 times the weight files and the KV cache, plus 450 MB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from vila.core.system import system_info

_WORKER = """
import json, sys
from pathlib import Path

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

import torch
import vila
from vila.engine.engine import Engine

path, threads, prompt_tokens, tokens, dtype = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
torch.set_num_threads(threads)
result = {"imports": memory("VmRSS:")}
engine = Engine.load(path, dtype=dtype)
result["loaded"] = memory("VmRSS:")
words = "one two three four five six seven eight nine ten ".split()
text = ""
while len(engine.processor.prompt([vila.Message.of("user", text)]).ids) < prompt_tokens:
    text += words[len(text) % 10] + " "
answer = engine.complete([[vila.Message.of("user", text)]], max_new_tokens=tokens)[0]
pool = engine._offline.scheduler.pool
result["kv_cache"] = pool.cache.token_bytes * (answer.prompt_tokens + tokens)
result["backend"], result["dtype"] = engine.backend, str(engine.model.dtype).removeprefix("torch.")
result["peak"] = memory("VmHWM:")
print(json.dumps(result))
"""


def measure(model: Path, threads: int, prompt_tokens: int, tokens: int, dtype: str) -> dict[str, Any]:
    """Return bytes of a checkpoint's files and of the process that runs it."""
    arguments = [str(model), str(threads), str(prompt_tokens), str(tokens), dtype]
    done = subprocess.run([sys.executable, "-c", _WORKER, *arguments], capture_output=True, text=True, check=True)
    result = {"model": model.name, **json.loads(done.stdout)}
    result["files"] = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    result["bound"] = int(1.15 * (result["files"] + result["kv_cache"]) + 450e6)
    return result


def main() -> None:
    """Print a table, and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=640)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results = []
    print("| model | backend | files | KV cache | imports | loaded | peak | bound |\n| --- | --- | " + "--- | " * 6)
    for model in options.models:
        one = measure(model, options.threads, options.prompt_tokens, options.tokens, options.dtype)
        results.append(one)
        sizes = [one[name] / 1e6 for name in ("files", "kv_cache", "imports", "loaded", "peak", "bound")]
        print(
            f"| {one['model']} | {one['backend']}, {one['dtype']} | " + " | ".join(f"{s:.0f} MB" for s in sizes) + " |"
        )
    if options.output:
        options.output.write_text(json.dumps({"results": results, **system_info()}, indent=1), "utf-8")


if __name__ == "__main__":
    main()
