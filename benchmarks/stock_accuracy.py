"""Measure the easy-VQA accuracy of a `llava-hf` directory with transformers only, without importing vila.

    vila convert runs/starter/model runs/starter/llava-hf --layout llava-hf
    python benchmarks/stock_accuracy.py runs/starter/llava-hf DIR/easy-vqa/test --questions 1000
    vila eval runs/starter/model --benchmarks easy_vqa --questions 1000 --data DIR/easy-vqa

The questions are those of the first images of the test set, in order of first appearance, as in `vila eval`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration


def first_questions(folder: Path, count: int) -> list[tuple[str, str, str]]:
    """Return (question, answer, image) of the first images that together have `count` questions."""
    rows = json.loads((folder / "questions.json").read_text())
    by_picture: dict[str, list[tuple[str, str, str]]] = {}
    for question, answer, image in rows:
        by_picture.setdefault(str(image), []).append((question, answer, str(image)))
    out: list[tuple[str, str, str]] = []
    for group in by_picture.values():
        if len(out) >= count:
            break
        out += group
    return out


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, help="directory with questions.json and images/")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    processor = AutoProcessor.from_pretrained(options.model)
    model = LlavaForConditionalGeneration.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    asked = first_questions(options.data, options.questions)
    right = 0
    for number, (question, answer, image) in enumerate(asked, 1):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        with Image.open(options.data / "images" / f"{image}.png") as opened:
            inputs = processor(images=opened.convert("RGB"), text=prompt, return_tensors="pt").to(model.dtype)
        made = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        text = processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += text.strip().rstrip(".").lower() == answer.lower()
        if number % 100 == 0:
            print(f"{number}: {right / number:.2%}", file=sys.stderr)
    loaded = sorted(name for name in sys.modules if name.split(".")[0] == "vila")
    assert not loaded, loaded
    facts = {"questions": len(asked), "accuracy": right / len(asked), "dtype": options.dtype,
             "torch": torch.__version__, "transformers": transformers.__version__}  # fmt: skip
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
