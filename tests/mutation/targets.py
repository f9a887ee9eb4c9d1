"""Inputs that `vila` reads, with their readers: valid files that the mutation test changes."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image as PilImage

MAX_FILE = 4_000_000
"""Larger files of a target are not mutated."""


@dataclass(frozen=True)
class Target:
    """One type of input.

    write: writes a valid input into an empty directory.
    use:   reads the whole input in that directory, as a command does.
    """

    name: str
    write: Callable[[Path], object]
    use: Callable[[Path], object]

    def files(self, root: Path) -> list[Path]:
        """Files that may be mutated, in the order of their names."""
        return sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink() and p.stat().st_size < MAX_FILE)


def targets() -> list[Target]:
    """All types of inputs."""
    return [
        *_data(),
        *_preparation(),
        *_checkpoints(),
        *_media(),
        *_evaluation(),
        *_quantization(),
        *_training(),
        *_command_line(),
    ]


def _data() -> Iterator[Target]:
    from tests.data.good import GOOD
    from vila.data.formats.base import FORMATS

    for (name, container), write in GOOD.items():

        def use(root: Path, name: str = name) -> None:
            source = FORMATS[name].open(next(root.glob("d.*")), root)
            for number in range(len(source)):
                for item in source[number].media:
                    item.source.read() if hasattr(item.source, "read") else None

        yield Target(f"data {name} {container}", write, use)


def _checkpoints() -> Iterator[Target]:
    from tests import tiny
    from tests.model.layouts.published import FIXTURES
    from vila.model.int4_weights import use_int4
    from vila.model.loading import load_model, save_model
    from vila.quant.apply import quantize_model

    def load(root: Path) -> None:
        # The base directory is next to the checkpoint that needs it.
        base = root / "base"
        load_model(root / "checkpoint", base=base if base.exists() else None)

    forms = ("mlp2x", "bin", "sharded-safetensors", "sharded-bin", "stage-1", "lora")
    for name in [*(f"v1-{form}" for form in forms), "v15-odd-grid", "v15-sharded-bin", "v15-intern-vit", "v15-s2"]:
        yield Target(f"checkpoint {name}", FIXTURES[name], load)
    for layout in ("native", "llava-hf"):

        def write(root: Path, layout: str = layout) -> None:
            save_model(*tiny.vila(tower="clip"), root / "checkpoint", layout)

        yield Target(f"checkpoint {layout}", write, load)

    def write_adapter(root: Path) -> None:
        from vila.config.schema import Lora
        from vila.train.lora import add_adapters, save_adapter

        model, processor = tiny.vila()
        save_model(model, processor, root / "base")
        add_adapters(model, Lora(rank=2), seed=1)
        save_adapter(model, processor, root / "checkpoint", "base")

    yield Target("checkpoint adapter", write_adapter, load)
    for layout in ("awq-hf", "tinychat"):

        def write_int4(root: Path, layout: str = layout) -> None:
            model, processor = tiny.vila(tower="clip", hidden_size=128, intermediate_size=256)
            use_int4(model, quantize_model(model, None, 128))
            save_model(model, processor, root / "checkpoint", layout)

        yield Target(f"checkpoint {layout}", write_int4, load)


def _preparation() -> Iterator[Target]:
    from vila.prepare.pkl import read_plain_pickle

    def write(root: Path) -> None:
        record = {"text_list": ["one", "two"], "image_info": [{"image_base64": "QUJD", "sim": 0.5}], "url": None}
        (root / "a.pkl").write_bytes(pickle.dumps([record] * 9))

    yield Target("pickle", write, lambda root: read_plain_pickle(root / "a.pkl"))


def _media() -> Iterator[Target]:
    from vila.core.types import Image, Video
    from vila.media.image import open_image
    from vila.media.video import open_frames

    drawn = PilImage.effect_noise((48, 32), 60)
    for kind in ("png", "jpeg", "webp", "tiff", "bmp", "gif"):

        def write(root: Path, kind: str = kind) -> None:
            drawn.convert("L" if kind == "gif" else "RGB").save(root / f"a.{kind}")

        yield Target(f"image {kind}", write, lambda root: open_image(Image(next(root.glob("a.*")))))
    frames = [PilImage.effect_noise((48, 32), 60) for _ in range(6)]
    for kind in ("gif", "webp"):

        def write_frames(root: Path, kind: str = kind) -> None:
            frames[0].save(root / f"a.{kind}", save_all=True, append_images=frames[1:], duration=40)

        yield Target(f"animation {kind}", write_frames, lambda root: open_frames(Video(next(root.glob("a.*"))), 4))
    for kind, codec in (("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mjpeg")):

        def write_video(root: Path, kind: str = kind, codec: str = codec) -> None:
            from tests.media.test_video import video_bytes

            pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            (root / f"a.{kind}").write_bytes(video_bytes(kind, codec, pixels=pixels))

        yield Target(f"video {kind}", write_video, lambda root: open_frames(Video(next(root.glob("a.*"))), 4))


def _evaluation() -> Iterator[Target]:
    from scripts.make_eval_data import LAYOUTS
    from vila.eval.benchmark import BENCHMARKS, ScoringProtocol
    from vila.eval.predictions import predicted_answers, read_answers
    from vila.eval.submit import SERVERS

    def ask_and_score(root: Path, name: str, protocol: ScoringProtocol) -> None:
        benchmark: Any = BENCHMARKS[name](root, 0)
        items = list(benchmark.items())
        answers = predicted_answers(items, {item.id: item.truth or "A" for item in items})
        benchmark.score(answers, protocol)
        if name in SERVERS and name != "vizwiz":  # its server takes only the test split
            benchmark.submission(answers)

    for name, write in LAYOUTS.items():
        for protocol in ("upstream", "lmms-eval"):
            if name not in ("vqav2", "vizwiz"):  # without the annotations below, only a server can score them
                yield Target(
                    f"benchmark {name} {protocol}", write, partial(ask_and_score, name=name, protocol=protocol)
                )
    for name, write in (("vqav2", write_vqav2_val), ("vizwiz", write_vizwiz_val)):
        yield Target(f"benchmark {name} annotations", write, partial(ask_and_score, name=name, protocol="upstream"))
        yield Target(f"benchmark {name} questions", LAYOUTS[name], partial(_ask_and_submit, name=name))
    yield Target("benchmark easy_vqa", _write_easy_vqa, partial(ask_and_score, name="easy_vqa", protocol="upstream"))
    yield Target("benchmark videoqa", _write_video_qa, _score_video_qa)

    def write_answers(root: Path) -> None:
        rows = [{"question_id": n, "prompt": "q", "text": "yes"} for n in range(6)]
        (root / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    yield Target("answers", write_answers, lambda root: read_answers(root / "answers.jsonl"))
    yield Target("evaluation run", _write_run, _use_run)


def write_vqav2_val(root: Path) -> None:
    """Annotations and questions of VQAv2's validation split."""
    home = root / "vqav2"
    home.mkdir()
    humans = [{"answer": word, "answer_id": n} for n, word in enumerate(["red"] * 7 + ["blue"] * 3)]
    rows = [
        {"question_id": n, "image_id": 1, "question_type": "what", "answer_type": "other", "answers": humans}
        for n in range(3)
    ]
    asked = [{"question_id": n, "image_id": 1, "question": f"what is {n}?"} for n in range(3)]
    (home / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": rows}))
    (home / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": asked}))
    lines = [json.dumps({"question_id": n, "image": "a.jpg", "text": "what?"}) for n in range(3)]
    (home / "llava_vqav2_mscoco_test2015.jsonl").write_text("\n".join(lines))


def write_vizwiz_val(root: Path) -> None:
    """The validation split of VizWiz."""
    (root / "vizwiz").mkdir()
    humans = [{"answer": word} for word in ["red"] * 7 + ["blue"] * 3]
    rows = [
        {"image": f"VizWiz_val_{n:08d}.jpg", "question": "what is this", "answer_type": "other", "answers": humans}
        for n in range(3)
    ]
    (root / "vizwiz" / "val.json").write_text(json.dumps(rows))


def _ask_and_submit(root: Path, name: str) -> None:
    from vila.eval.benchmark import BENCHMARKS
    from vila.eval.predictions import predicted_answers

    benchmark: Any = BENCHMARKS[name](root, 0)
    items = benchmark.items()
    benchmark.submission(predicted_answers(items, {item.id: "A" for item in items}))


def _write_easy_vqa(root: Path) -> None:
    rows = [["what color is the shape?", "red", 0], ["is there a circle?", "no", 0], ["what shape is it?", "circle", 1]]
    (root / "test" / "images").mkdir(parents=True)
    (root / "test" / "questions.json").write_text(json.dumps(rows))


def _write_video_qa(root: Path) -> None:
    home = root / "GPT_Zero_Shot_QA" / "MSVD_Zero_Shot_QA"
    home.mkdir(parents=True)
    rows = [{"video_name": f"vid{n}", "question": f"what is {n}?", "question_id": n} for n in range(3)]
    (home / "test_q.json").write_text(json.dumps(rows))
    (home / "test_a.json").write_text(json.dumps([{"answer": f"a{n}"} for n in range(3)]))
    verdicts = {str(n): [{"pred": "yes", "score": 4}, {"q": "", "a": "", "pred": ""}] for n in range(3)}
    (root / "merged.json").write_text(json.dumps(verdicts))
    reply = {"choices": [{"message": {"content": "{'pred': 'yes', 'score': 4}"}}]}
    lines = [json.dumps({"custom_id": str(n), "response": {"body": reply}}) for n in range(3)]
    (root / "batch.jsonl").write_text("\n".join(lines))


def _score_video_qa(root: Path) -> None:
    from vila.eval.benchmark import BENCHMARKS
    from vila.eval.judge import ReplyFile
    from vila.eval.predictions import predicted_answers

    benchmark: Any = BENCHMARKS["videoqa_msvd"](root, 0)
    items = benchmark.items()
    answers = predicted_answers(items, {item.id: "it" for item in items})
    for replies in ("merged.json", "batch.jsonl"):
        benchmark.judge = ReplyFile(root / replies)
        benchmark.score(answers)


def _write_run(root: Path) -> None:
    from tests.eval.mini_datasets import write_mini_datasets, write_mini_run

    # Beside the input: only the files of a run are changed, the data have targets of their own.
    data = write_mini_datasets(root.parent / "data")
    for name in ("first", "second"):
        write_mini_run(data, root / name, ("pope", "scienceqa"))


def _use_run(root: Path) -> None:
    from vila.eval.compare import compare_runs
    from vila.eval.report import write_report
    from vila.eval.submit import submit_run

    write_report(root / "second")
    compare_runs(root / "first", root / "second", root / "compare")
    submit_run(root / "second", root / "submitted", root.parent / "data", {"pope": "pope", "scienceqa": "scienceqa"})


def _quantization() -> Iterator[Target]:
    import torch

    from tests import tiny
    from vila.quant.awq_cache import read_search, save_search
    from vila.quant.calibration import read_documents, text_calibration

    def write_cache(root: Path) -> None:
        one = torch.rand(32) + 0.5
        block = "model.layers.0"
        found = {
            "scale": [(f"{block}.input_layernorm", tuple(f"{block}.self_attn.{n}_proj" for n in "qkv"), one)],
            "clip": [(f"{block}.mlp.down_proj", torch.rand(32, 2, 1))],
        }
        torch.save(found, root / "a.pt")

    def write_text(root: Path) -> None:
        rows = [{"text": f"a line of text, number {n}"} for n in range(40)]
        (root / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def use_text(root: Path) -> None:
        text_calibration(read_documents(root / "a.jsonl"), tiny.tokenizer(), length=64, max_sequences=2)

    def write_search(root: Path) -> None:
        write_cache(root)
        save_search(read_search(root / "a.pt"), root / "search.safetensors")
        (root / "a.pt").unlink()

    yield Target("awq_cache", write_cache, lambda root: read_search(root / "a.pt"))
    yield Target("search", write_search, lambda root: read_search(root / "search.safetensors"))
    yield Target("calibration", write_text, use_text)


def _training() -> Iterator[Target]:
    from tests.train.tiny_run import write_training_files

    def write(root: Path) -> None:
        write_training_files(root, records=6)
        _train(root, "output.checkpoint_every_s=0.001", "budget.tokens=400")

    def resume(root: Path) -> None:
        _train(root, "output.checkpoint_every_s=0.001", "budget.tokens=400")

    def report(root: Path) -> None:
        from vila.train.report import write_report

        write_report(root / "out")

    yield Target("training resume", write, resume)
    yield Target("training report", write, report)


def _train(root: Path, *overrides: str) -> None:
    from tests.train.tiny_run import tiny_recipe
    from vila.train.build import build

    # Relative paths, so that a copy of the directory is the same run.
    with chdir(root):
        run = build(tiny_recipe(Path(), "out", *overrides))
        run.trainer.run()
        run.trainer.checkpointer.writer.wait()


def _command_line() -> Iterator[Target]:
    def write_recipe(root: Path) -> None:
        (root / "r.yaml").write_text(RECIPE)

    def use_recipe(root: Path) -> None:
        from vila.config.load import load_recipe

        load_recipe(str(root / "r.yaml"))

    def write_csv(root: Path) -> None:
        for number in range(3):
            PilImage.new("RGB", (8, 8), (80 * number, 0, 0)).save(root / f"{number}.png")
        (root / "t.csv").write_text("image,question,answer\n" + "".join(f"{n}.png,what?,red {n}\n" for n in range(3)))

    def use_csv(root: Path) -> None:
        vila("data", "from-csv", root / "t.csv", "--image-root", root, "--output", root / "out.jsonl")

    def write_questions(root: Path) -> None:
        PilImage.new("RGB", (8, 8)).save(root / "a.png")
        rows = [{"id": str(n), "image": "a.png", "prompt": f"what {n}?"} for n in range(4)]
        (root / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def use_questions(root: Path) -> None:
        from vila.cli.prompt_input import read_prompt_records

        read_prompt_records(root / "q.jsonl")

    yield Target("recipe", write_recipe, use_recipe)
    yield Target("csv", write_csv, use_csv)
    yield Target("questions", write_questions, use_questions)


RECIPE = """name: r
model: {path: model}
stage: {tune: [projector, llm], lr: 1.0e-3}
data:
  max_length: 128
  template: starter_qa
  packing: none
  mixture:
    - {format: messages, path: data.jsonl, repeat: 2}
batch: {samples: 4}
budget: {epochs: 3}
compute: {dtype: float32, workers: 0}
output: {dir: out}
"""


def vila(*arguments: Any) -> str:
    """Run a command in this process and return its output; a failure raises the underlying error."""
    from vila.cli import main as command

    failures: list[str] = []
    out, complaints = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(complaints):
        try:
            command.main([str(argument) for argument in arguments])
        except SystemExit as ended:
            if ended.code not in (0, None):
                failures.append(complaints.getvalue())
                if ended.code == 70:  # an exception that is not ours
                    raise RuntimeError(complaints.getvalue()) from ended
    if failures:
        from vila.core.errors import VilaError

        raise VilaError(" ".join(failures[0].split()))
    return out.getvalue()


def random_of(seed: int) -> random.Random:
    """The generator of one input."""
    return random.Random(f"vila mutation {seed} {os.environ.get('VILA_MUTATION_SEED', '0')}")
