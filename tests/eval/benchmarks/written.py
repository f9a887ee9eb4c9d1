"""Write benchmark files, answers and prompts for tests."""

import json
from pathlib import Path

from vila.chat.render import render
from vila.chat.templates import find_template
from vila.eval.benchmark import Answer, Item

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\n"
)
SHORT = "Answer the question using a single word or phrase."


def jsonl(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def plain(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def answers(texts: dict, prompts: dict | None = None) -> list[Answer]:
    return [
        Answer(key, text, (prompts or {}).get(key, ""), f"a.jsonl line {n}")
        for n, (key, text) in enumerate(texts.items(), 1)
    ]


def humans(counts: dict[str, int], **fields) -> list[dict]:
    """Ten human answers, as VQA's annotation files have them."""
    texts = [text for text, count in counts.items() for _ in range(count)]
    assert len(texts) == 10
    return [{"answer": text, "answer_confidence": "yes", **fields} for text in texts]


def whole_prompt(item: Item, template: str = "vicuna_v1") -> str:
    """Return the rendered prompt with <image> placeholders."""
    segments = render(item.messages, find_template(template), prompt=True)
    return "".join("<image>" if segment.media else segment.text for segment in segments)
