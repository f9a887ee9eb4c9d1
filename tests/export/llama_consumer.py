"""Runs GGUF files in llama-cpp-python, in a separate environment: JSON on stdin, JSON on stdout.

model, mmproj: files. texts: strings to cut into tokens. greedy: [ids, count] pairs to continue. forced: rows of ids,
for each of whose places the likeliest next id is wanted. image: side and RGB bytes (hex) of a square image, ids
before and after it, and how many tokens to say.
"""

import ctypes
import json
import sys

import numpy as np
from llama_cpp import Llama, __version__, mtmd_cpp


def answer(asked: dict) -> dict:
    llm = Llama(asked["model"], n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    out: dict = {"version": __version__}
    out["texts"] = [llm.tokenize(text.encode(), add_bos=True, special=True) for text in asked.get("texts", ())]
    out["greedy"] = [greedy(llm, ids, count) for ids, count in asked.get("greedy", ())]
    out["forced"] = [forced(llm, ids) for ids in asked.get("forced", ())]
    out["template"] = llm.metadata.get("tokenizer.chat_template")
    if "image" in asked:
        out["image"] = image(llm, asked["mmproj"], asked["image"])
    return out


def greedy(llm: Llama, ids: list[int], count: int) -> list[int]:
    llm.reset()
    llm.eval(ids)
    return go_on(llm, count)


def go_on(llm: Llama, count: int) -> list[int]:
    greedy: list[int] = []
    for _ in range(count):
        logits = np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(llm.n_vocab(),))
        greedy.append(int(logits.argmax()))
        llm.eval(greedy[-1:])
    return greedy


def forced(llm: Llama, ids: list[int]) -> list[int]:
    llm.reset()
    llm.eval(ids)
    return [int(row.argmax()) for row in llm.scores[: len(ids)]]


def image(llm: Llama, mmproj: str, asked: dict) -> dict:
    params = mtmd_cpp.mtmd_context_params_default()
    params.use_gpu, params.print_timings, params.n_threads, params.warmup = False, False, 1, False
    seeing = mtmd_cpp.mtmd_init_from_file(mmproj.encode(), llm.model, params)
    assert seeing is not None, "llama.cpp cannot load the mmproj file"
    chunk, keep = image_chunk(seeing, asked["side"], bytes.fromhex(asked["rgb"]))
    tokens = mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk)
    assert mtmd_cpp.mtmd_encode_chunk(seeing, chunk) == 0
    embeds = mtmd_cpp.mtmd_get_output_embd(seeing)
    vectors = np.ctypeslib.as_array(embeds, shape=(tokens, llm.n_embd())).tolist()
    llm.reset()
    if asked["before"]:
        llm.eval(asked["before"])
    past = ctypes.c_int(0)
    done = mtmd_cpp.mtmd_helper_eval_chunk_single(
        seeing, llm.ctx, chunk, len(asked["before"]), 0, 512, True, ctypes.byref(past)
    )
    assert done == 0
    llm.n_tokens = past.value
    llm.eval(asked["after"])
    return {"tokens": tokens, "vectors": vectors, "greedy": go_on(llm, asked["count"])}


def image_chunk(seeing: object, side: int, rgb: bytes) -> tuple[object, list]:
    data = (ctypes.c_uint8 * len(rgb)).from_buffer_copy(rgb)
    bitmap = mtmd_cpp.mtmd_bitmap_init(side, side, data)
    text = mtmd_cpp.mtmd_input_text()
    text.text = mtmd_cpp.mtmd_default_marker()
    text.text_len = len(text.text)
    text.add_special, text.parse_special = False, True
    chunks = mtmd_cpp.mtmd_input_chunks_init()
    bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
    assert mtmd_cpp.mtmd_tokenize(seeing, chunks, ctypes.byref(text), bitmaps, 1) == 0
    for number in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
        chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, number)
        if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            return chunk, [data, bitmap, chunks]
    raise AssertionError("no image among the chunks")


if __name__ == "__main__":
    print(json.dumps(answer(json.load(sys.stdin))))
