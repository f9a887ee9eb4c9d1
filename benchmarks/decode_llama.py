"""llama.cpp process of decode_peer.py; runs in its own environment with llama-cpp-python and without vila.

    PYTHON decode_llama.py MODEL.gguf THREADS CONTEXT

For each line "PROMPT TOKENS" of standard input, prints one JSON line with the seconds to the first token and of each
later step. The first line of its output has the version and the system information of llama.cpp.
"""

import ctypes
import json
import sys
import time

import llama_cpp
import numpy as np


def main() -> None:
    path, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model = llama_cpp.Llama(path, n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)
    system = llama_cpp.llama_print_system_info().decode().strip()
    print(json.dumps({"version": llama_cpp.__version__, "system": system}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(model, *map(int, line.split()))), flush=True)


def run(model: llama_cpp.Llama, prompt: int, tokens: int) -> dict:
    model.reset()
    times = []
    given = [10 + place % 200 for place in range(prompt)]
    for _ in range(tokens):
        begin = time.perf_counter()
        model.eval(given)
        logits = llama_cpp.llama_get_logits(model.ctx)
        values = np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (model.n_vocab(),))
        given = [int(values.argmax())]
        times.append(time.perf_counter() - begin)
    return {"first": times[0], "steps": times[1:]}


main()
