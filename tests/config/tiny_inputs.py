"""Inputs for training with packaged recipes: a tiny LLM, tiny towers and tiny data in every format."""

import base64
import copy
from pathlib import Path

import av
import numpy as np
from transformers import AutoModel, AutoModelForCausalLM

from tests import tiny
from tests.data.shards import write_lines, write_tar
from vila.chat.templates import TEMPLATES

RECORDS = 24


def write_parts(folder: Path) -> Path:
    """`llm` with its tokenizer, and the towers `clip`, `siglip` and `dinov2` of 28 x 28 pixels."""
    tokenizer = copy.deepcopy(tiny.tokenizer())
    # Special tokens of all templates.
    written = {token for template in TEMPLATES.values() for token in template.special_tokens if token[0] == "<"}
    tokenizer.add_tokens(sorted(written), special_tokens=True)
    llm = AutoModelForCausalLM.from_config(tiny.text_config("llama", vocab_size=len(tokenizer)))
    llm.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    for tower in ("clip", "siglip", "dinov2"):
        AutoModel.from_config(tiny.vision_config(tower)).save_pretrained(folder / tower)
    return folder


def write_data(folder: Path) -> dict[str, Path]:
    """Write RECORDS records in each format, with an image and a video; return format -> file."""
    image = tiny.image(0).source
    (folder / "p.png").write_bytes(image)
    write_video(folder / "v.mp4")
    numbers = [str(number) for number in range(RECORDS)]
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    llava = [{"id": number, "image": "p.png", "conversations": turns} for number in numbers]
    videos = [
        {"id": number, "video": "v.mp4", "conversations": [{**turns[0], "value": "<video>\nWhat?"}, turns[1]]}
        for number in numbers
    ]
    page = {"text_list": ["One.", "Two."], "image_info": [
        {"matched_text_index": 1, "matched_sim": 0.3, "image_base64": base64.b64encode(image).decode()}]}  # fmt: skip
    question = {"question": "<image>\nWhat?", "answer": "A cat.", "image": ["p.png"]}
    shown = [{"type": "image", "path": "p.png"}, {"type": "text", "text": "What?"}]
    message = {"messages": [{"role": "user", "content": shown}, {"role": "assistant", "content": "A cat."}]}
    pairs = [
        (f"{number}.{kind}", content) for number in numbers for kind, content in (("png", image), ("txt", "A cat."))
    ]
    return {
        "llava_json": write_lines(folder / "llava.jsonl", llava),
        "llava_json_v15": write_lines(folder / "llava15.jsonl", llava),
        "video_json": write_lines(folder / "videos.jsonl", videos),
        "mmc4": write_lines(folder / "mmc4.jsonl", [page] * RECORDS),
        "coyo": write_tar(folder / "coyo.tar", pairs),
        "vflan": write_lines(
            folder / "vflan.jsonl", [question, {**question, "question": "Hi", "image": []}] * (RECORDS // 2)
        ),
        "messages": write_lines(folder / "messages.jsonl", [message] * RECORDS),
    }


def write_video(path: Path) -> None:
    """Write ten frames of 32 x 32 pixels."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for number in range(10):
            frame = np.full((32, 32, 3), 20 * number, dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode(None))
