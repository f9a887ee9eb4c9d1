"""Write a small `playground/data/eval`: ten benchmarks in their published layouts, with a few questions each.

    python scripts/make_eval_data.py FOLDER

Each image is one coloured shape, which determines the answers. File names, fields and order are those of the published
files; the questions are invented. The output is deterministic.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

SHORT = "Answer the question using a single word or phrase."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
LETTERS = "ABCD"


class Scene(NamedTuple):
    """Content of one image."""

    colour: str
    shape: str


SCENES = (Scene("red", "circle"), Scene("blue", "square"), Scene("green", "triangle"))


def main() -> int:
    """Write all layouts into the directory given on the command line."""
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    make_eval_data(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: {', '.join(LAYOUTS)}")
    return 0


def make_eval_data(folder: Path) -> None:
    """Write all ten layouts into `folder`, which corresponds to `playground/data/eval`."""
    for write in LAYOUTS.values():
        write(folder)


def vqav2(folder: Path) -> None:
    """Write questions of test2015; all but those about the last image are test-dev. Answers are not published."""
    home = folder / "vqav2"
    rows = [
        {"question_id": 1000 * number + k, "image": f"COCO_test2015_{number:012d}.jpg", "text": text,
         "category": "default"}
        for number, scene in enumerate(SCENES, start=1)
        for k, (text, _) in enumerate(short_questions(scene))
    ]  # fmt: skip
    write_jsonl(home / "llava_vqav2_mscoco_test2015.jsonl", rows)
    write_jsonl(home / "llava_vqav2_mscoco_test-dev2015.jsonl", rows[:-3])
    write_images(home / "test2015", "COCO_test2015_{:012d}.jpg")


def gqa(folder: Path) -> None:
    """Write the layout of VILA. The questions are balanced, except one that is in no question file."""
    home = folder / "gqa"
    rows, truths = [], {}
    for number, scene in enumerate(SCENES, start=1):
        for k, (text, answer) in enumerate(short_questions(scene)):
            key = f"2013{number:02d}{k:03d}"
            rows.append({"question_id": key, "image": f"n{number:06d}.jpg", "text": text, "category": "default"})
            kind = "query" if answer not in ("yes", "no") else "verify"
            truths[key] = {
                "question": text.split("\n")[0],
                "answer": answer,
                "imageId": f"n{number:06d}",
                "isBalanced": True,
                "types": {"structural": kind, "semantic": "attr", "detailed": f"{kind}Attr"},
                "groups": {"global": scene.shape if kind == "query" else None, "local": f"{number}-{k}"},
                "semantic": [
                    {"operation": "select", "argument": "shape (1)", "dependencies": []},
                    {"operation": "query", "argument": "name", "dependencies": [0]},
                ],
            }
    truths["999"] = {**truths["201301000"], "isBalanced": False}
    write_jsonl(home / "llava_gqa_testdev_balanced.jsonl", rows)
    write_json(home / "testdev_balanced_questions.json", truths)
    write_images(home / "images", "n{:06d}.jpg")


def vizwiz(folder: Path) -> None:
    """Write the test split: one question per image, ids from 0."""
    home = folder / "vizwiz"
    rows, published = [], []
    for number, scene in enumerate(SCENES):
        image = f"VizWiz_test_{number:08d}.jpg"
        question = "What color is this?" if number else "what is this"
        text = f"{question}\n{UNANSWERABLE}\n{SHORT}"
        rows.append({"question_id": number, "image": image, "text": text, "category": "default"})
        published.append({"image": image, "question": question})
        save(home / "test" / image, draw(scene))
    write_jsonl(home / "llava_test.jsonl", rows)
    write_json(home / "test.json", published)


def scienceqa(folder: Path) -> None:
    """Write questions with an image, one without, and one of another split."""
    home = folder / "scienceqa"
    asked, problems = [], {}
    for number, scene in enumerate((*SCENES, Scene("grey", "mist")), start=1):
        key, shown = str(number), number <= len(SCENES)
        question, choices = "Which shape is this?", ["circle", "square", "triangle"]
        hint, answer = ("Look at the picture.", number - 1) if shown else ("", 0)
        if not shown:
            question, choices = "Which of these is round?", ["a ball", "a box"]
        body = (f"Context: {hint}\n" if hint else "") + question + options(choices)
        row: dict[str, Any] = {"id": key, "conversations": [{"from": "human", "value": body}]}
        if shown:
            row["image"] = f"{key}/image.png"
            row["conversations"][0]["value"] = f"<image>\n{body}"
            save(home / "images" / "test" / key / "image.png", draw(scene))
        row["conversations"].append({"from": "gpt", "value": LETTERS[answer]})
        asked.append(row)
        problems[key] = {
            "question": question, "choices": choices, "answer": answer, "hint": hint,
            "image": "image.png" if shown else None, "subject": "natural science", "split": "test",
        }  # fmt: skip
    problems["9"] = {**problems["4"], "split": "train"}
    write_json(home / "llava_test_CQM-A.json", asked)
    write_json(home / "problems.json", problems)
    write_json(home / "pid_splits.json", {"train": ["9"], "test": ["1", "2", "3", "4"]})


def textvqa(folder: Path) -> None:
    """Write question ids that are image ids, so two questions share one; one image has no OCR tokens."""
    home = folder / "textvqa"
    rows, truths = [], []
    for number, scene in enumerate(SCENES):
        image = f"{number:016x}"
        tokens = ", ".join(scene) if number else ""
        for question, answer in (("What color is it?", scene.colour), ("What is the shape called?", scene.shape)):
            text = f"{question}\nReference OCR token: {tokens}\n{SHORT}"
            rows.append({"question_id": image, "image": f"{image}.jpg", "text": text, "category": "default"})
            people = [answer] * 8 + ["unanswerable", f"a {answer}"]
            truths.append({"question_id": len(truths), "question": question, "image_id": image, "answers": people,
                           "question_tokens": question.lower().split(), "set_name": "val"})  # fmt: skip
        save(home / "train_images" / f"{image}.jpg", draw(scene))
    write_jsonl(home / "llava_textvqa_val_v051_ocr.jsonl", rows)
    write_json(home / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "dataset_version": "0.5.1", "data": truths})


def pope(folder: Path) -> None:
    """Write three categories; question ids of the labels start at 1 in each file."""
    home = folder / "pope"
    rows = []
    for first, category in ((1, "adversarial"), (10_000_001, "random"), (20_000_001, "popular")):
        labels: list[dict[str, Any]] = []
        for number, scene in enumerate(SCENES, start=1):
            image = f"COCO_val2014_{number:012d}.jpg"
            for shape in (scene.shape, SCENES[number % 3].shape):
                question = f"Is there a {shape} in the image?"
                row = {"question_id": first + len(labels), "image": image, "text": f"{question}\n{SHORT}"}
                rows.append({**row, "category": category})
                label = "yes" if shape == scene.shape else "no"
                labels.append({"question_id": len(labels) + 1, "image": image, "text": question, "label": label})
        write_jsonl(home / "coco" / f"coco_pope_{category}.json", labels)
    write_jsonl(home / "llava_pope_test.jsonl", rows)
    write_images(home / "val2014", "COCO_val2014_{:012d}.jpg")


def mme(folder: Path) -> None:
    """Write one image per category; five categories have separate directories for images and texts."""
    home = folder / "MME"
    release = home / "MME_Benchmark_release_version"
    split = ("artwork", "celebrity", "landmark", "posters", "scene")
    flat = ("existence", "count", "position", "color", "OCR", "commonsense_reasoning", "numerical_calculation",
            "text_translation", "code_reasoning")  # fmt: skip
    rows = []
    for number, category in enumerate((*split, *flat)):
        scene, other = SCENES[number % 3], SCENES[(number + 1) % 3]
        image = f"{category}/images/0001.jpg" if category in split else f"{category}/0001.jpg"
        lines = []
        for colour, answer in ((scene.colour, "Yes"), (other.colour, "No")):
            question = f"Is the {scene.shape} {colour}?"
            lines.append(f"{question} Please answer yes or no.\t{answer}")
            rows.append({"question_id": image, "image": image, "text": f"{question}\n{SHORT}", "category": category})
        texts = release / category / ("questions_answers_YN" if category in split else "")
        write_text(texts / "0001.txt", "\n".join(lines) + "\n")
        save(release / image, draw(scene))
    write_jsonl(home / "llava_mme.jsonl", rows)


def mmbench(folder: Path) -> None:
    """Write the English version."""
    texts = ("Which shape is this?", "Which color is it?", "Look closely.")
    _mmbench(folder / "mmbench" / "mmbench_dev_20230712.tsv", texts, {})


def mmbench_cn(folder: Path) -> None:
    """Write the Chinese version, at the path that the original scripts read."""
    words = {"circle": "圆形", "square": "方形", "triangle": "三角形", "red": "红色", "blue": "蓝色", "green": "绿色"}
    texts = ("这是什么形状", "它是什么颜色", "请仔细看")
    _mmbench(folder / "mmbench_cn" / "mmbench_dev_cn_20231003.tsv", texts, words)


def seed(folder: Path) -> None:
    """Write twelve question types; the last three are about the middle frame of a video."""
    home = folder / "seed_bench"
    kinds = (
        "Scene Understanding", "Instance Identity", "Instance Attributes", "Instance Location",
        "Instances Counting", "Spatial Relation", "Instance Interaction", "Visual Reasoning",
        "Text Understanding", "Action Recognition", "Action Prediction", "Procedure Understanding",
    )  # fmt: skip
    rows, truths = [], []
    for number, _ in enumerate(kinds, start=1):
        scene, video = SCENES[number % 3], number > 9
        choices = [each.shape for each in SCENES] + ["none of them"]
        question, answer = "Which shape is shown?", LETTERS[number % 3]
        key: int | str = f"v{number}" if video else 100 + number
        data = f"{number}_{key}" if video else f"{number}_{scene.shape}"
        image = f"SEED-Bench-video-image/{data}.png" if video else f"SEED-Bench-image/{data}"
        text = f"{question}{options(choices)}\nAnswer with the option's letter from the given choices directly."
        rows.append({"question_id": key, "image": image, "text": text, "category": number})
        truths.append({
            "answer": answer, **{f"choice_{x.lower()}": c for x, c in zip(LETTERS, choices, strict=True)},
            "data_id": data, "data_type": "video" if video else "image", "question": question,
            "question_id": str(key), "question_type_id": number, **({"segment": [0.0, 2.0]} if video else {}),
        })  # fmt: skip
        save(home / image, draw(scene), "PNG" if video else "JPEG")
    write_jsonl(home / "llava-seed-bench.jsonl", rows)
    types = {kind: number for number, kind in enumerate(kinds, start=1)}
    write_json(home / "SEED-Bench.json", {"question_type": types, "questions": truths})


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "vqav2": vqav2,
    "gqa": gqa,
    "vizwiz": vizwiz,
    "scienceqa": scienceqa,
    "textvqa": textvqa,
    "pope": pope,
    "mme": mme,
    "mmbench": mmbench,
    "mmbench_cn": mmbench_cn,
    "seed": seed,
}


def short_questions(scene: Scene) -> list[tuple[str, str]]:
    """Return three questions about a scene, with answers."""
    asked = [
        ("What shape is in the picture?", scene.shape),
        ("What color is it?", scene.colour),
        ("Is there a circle?", "yes" if scene.shape == "circle" else "no"),
    ]
    return [(f"{question}\n{SHORT}", answer) for question, answer in asked]


def options(choices: Sequence[str]) -> str:
    """Return lettered options, each after a line break."""
    return "".join(f"\n{chr(65 + number)}. {choice}" for number, choice in enumerate(choices))


def _mmbench(path: Path, texts: tuple[str, str, str], words: dict[str, str]) -> None:
    """Write two questions with three and four options; each rotation of the options is a record."""
    shape, colour, hint = texts
    columns = ["index", "question", "hint", *LETTERS, "answer", "category", "image", "source", "l2-category",
               "comment", "split"]  # fmt: skip
    asked = [
        (0, shape, hint, [each.shape for each in SCENES], SCENES[0].shape, SCENES[0], "shape"),
        (1, colour, "", [*(each.colour for each in SCENES), "black"], SCENES[1].colour, SCENES[1], "color"),
    ]
    rows = []
    for index, question, own_hint, choices, truth, scene, category in asked:
        image = base64.b64encode(encoded(draw(scene), "JPEG")).decode()
        for turn in range(len(choices)):
            turned = choices[turn:] + choices[:turn]
            cells = [words.get(choice, choice) for choice in turned] + [""] * (4 - len(turned))
            rows.append([index + 1_000_000 * turn, question, own_hint, *cells, LETTERS[turned.index(truth)], category,
                         image, "made here", "perception", "", "dev"])  # fmt: skip
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
    writer.writerows([columns, *rows])
    write_text(path, stream.getvalue())


def draw(scene: Scene, side: int = 48) -> Image.Image:
    """Draw a shape in the colour of the scene on white; an unknown shape gives a grey image."""
    image = Image.new("RGB", (side, side), "white" if scene in SCENES else "grey")
    pen, box = ImageDraw.Draw(image), (side // 6, side // 6, side - side // 6, side - side // 6)
    if scene.shape == "circle":
        pen.ellipse(box, fill=scene.colour)
    elif scene.shape == "square":
        pen.rectangle(box, fill=scene.colour)
    elif scene.shape == "triangle":
        pen.polygon([(side // 2, box[1]), (box[0], box[3]), (box[2], box[3])], fill=scene.colour)
    return image


def encoded(image: Image.Image, kind: str) -> bytes:
    """Return the bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def save(path: Path, image: Image.Image, kind: str = "") -> None:
    """Write an image in the format of its extension, or in `kind`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(image, kind or {".jpg": "JPEG", ".png": "PNG"}[path.suffix]))


def write_images(folder: Path, name: str) -> None:
    """Write the images of all scenes; `name` is a pattern for the number, from 1."""
    for number, scene in enumerate(SCENES, start=1):
        save(folder / name.format(number), draw(scene))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 with the line breaks of `text`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value."""
    write_text(path, json.dumps(value, ensure_ascii=False))


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
