"""`vila quickstart`: components, three training stages, quantization, evaluation, examples and a report, resumable.

Each finished step writes one JSON file to `steps/`; a further call reads these files and runs the remaining steps.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from shlex import quote
from typing import Any

from vila.config.load import load_recipe
from vila.config.schema import Recipe
from vila.core.errors import ConfigError, DataError
from vila.core.files import (
    DirectoryLock,
    atomic_path,
    cache_dir,
    portable_path,
    remove_partials,
    sha256_tree,
    write_json,
)
from vila.core.progress import SILENT, Events, task
from vila.core.reading import read_json_object
from vila.core.system import system_info
from vila.core.types import Image, Message
from vila.engine.engine import Engine
from vila.eval.benchmark import Item
from vila.eval.benchmarks.easy_vqa import EasyVqa
from vila.eval.predictions import read_texts
from vila.eval.runner import model_hash, result_dir, run_benchmark
from vila.model.loading import build_components, choose_dtype, load_model, open_components
from vila.prepare.licences import data_licences
from vila.quant.blocks import fitting_group_sizes
from vila.quant.calibration import packaged_documents, text_calibration
from vila.quant.quant_config import QuantConfig
from vila.quant.quantize import quantize_checkpoint
from vila.starter import components, easy_vqa
from vila.starter.components import resolve_component
from vila.starter.data import english_eval, is_validation, labelled_images, text_sha256, write_stage_data
from vila.starter.probes import SwappedEasyVqa, caption_nll, perplexity
from vila.starter.report import with_images, write_report
from vila.train.build import build, is_finished, model_dir
from vila.train.metrics import read_metrics
from vila.train.model_card import save_model_card

QUESTIONS = 300
"""Approximate number of test questions for comparing the model with its INT4 version."""
_ROWS = 1
"""Calibration sequences of 512 tokens, for a minute of quantization; `vila quantize` uses 16 by default."""


def quantize_model(model: Path, target: Path, events: Events) -> bool:
    """Quantize a model to INT4 at `target`, unless it exists. Returns False if no group size fits the model."""
    if target.is_dir():
        return True
    network, processor = load_model(model)
    sizes = fitting_group_sizes(network)
    if not sizes:
        events.log("skipping quantization: no group size divides the input sizes of the linear layers")
        return False
    calibration = text_calibration(packaged_documents(), processor.tokenizer, max_sequences=_ROWS)
    quantize_checkpoint(network, processor, target, QuantConfig(group_size=max(sizes)), calibration, events=events)
    return True


def compare_answers(
    whole: Path, small: Path, easy_vqa: Path, answered: Path, out: Path, questions: int, events: Events
) -> dict[str, Any]:
    """Compare size and accuracy of a model and its INT4 version on the same test questions.

    whole, small: directories of the model and of its INT4 version.
    answered:     predictions of the model, for at least these questions.
    out:          directory for the predictions of the INT4 version.
    Raises DataError if a line of `answered` is malformed or a question is missing.
    """
    benchmark = EasyVqa(easy_vqa, min(questions or QUESTIONS, QUESTIONS))
    items = benchmark.items()
    before = read_texts(answered, [item.id for item in items])
    benchmark.name = "easy_vqa_int4"
    engine = Engine.load(small, backend="torch")
    result = run_benchmark(engine, benchmark, out, model_id=model_hash(small), events=events)
    assert result is not None
    right = {item.id: (before[item.id] == item.truth, result.predictions[item.id] == item.truth) for item in items}
    return {
        "bytes_before": _bytes(whole),
        "bytes_after": _bytes(small),
        "questions": len(items),
        "accuracy_before": sum(own for own, _ in right.values()) / len(right),
        "accuracy_after": sum(other for _, other in right.values()) / len(right),
        "example": _example(items[0], before, result.predictions),
    }


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


def _example(item: Any, before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str]:
    return {
        "image": str(item.messages[0].parts[0].source),
        "question": item.messages[-1].text,
        "answer": after[item.id],
        "answer_before": before[item.id],
        "truth": item.truth,
    }


STAGES = ("1_align", "2_pretrain", "3_sft")
TITLES = ("Align: captions", "Pretrain: interleaved pages", "Instruct: questions")
FULL_MINUTES = 7.0
"""Training minutes on two cores that correspond to the recipes' token budgets."""
PERPLEXITY_TOKENS = 4096
_VALIDATION_IMAGES = 100
_SWAPPED_QUESTIONS = 2000


@dataclass(frozen=True)
class QuickstartOptions:
    """Options of a run.

    minutes:     training minutes on two cores; scales the token budgets of the recipes, so that results do not depend
                 on the speed of the machine.
    questions:   approximate number of test questions; 0 uses all.
    llm, vision: `wheel` for the component from PyPI, else a directory or a hub id.
    """

    out: Path = Path("runs/starter")
    minutes: float = FULL_MINUTES
    questions: int = 0
    seed: int = 0
    llm: str = "wheel"
    vision: str = "wheel"

    def __post_init__(self) -> None:
        if not 0 < self.minutes <= 1000:
            raise ConfigError(field="--minutes", value=self.minutes, expected="more than 0, at most 1000")
        if self.questions < 0:
            raise ConfigError(field="--eval-limit", value=self.questions, expected="0 (all) or more")

    def settings(self) -> dict[str, Any]:
        """Return the settings that must be equal to resume a run; directories are relative to the run's."""
        settings = {name: getattr(self, name) for name in ("minutes", "questions", "seed", "llm", "vision")}
        paths = {
            name: portable_path(settings[name], self.out) for name in ("llm", "vision") if settings[name] != "wheel"
        }
        return settings | paths


class Quickstart:
    """A quickstart run in one output directory."""

    def __init__(self, options: QuickstartOptions, events: Events = SILENT) -> None:
        self.options, self.events = options, events
        self.out = options.out
        self.cache = cache_dir()

    def run(self) -> dict[str, Any]:
        """Run the steps that are not finished. Returns the contents of the report.

        Raises ConfigError if `out` has a run with other settings, DirectoryInUseError if another process uses it.
        """
        with DirectoryLock(self.out).acquire(events=self.events):
            return self._run()

    def _run(self) -> dict[str, Any]:
        self._claim()
        self._parts()
        self._step("data", self._data)
        for stage, title in zip(STAGES, TITLES, strict=True):
            self._train(stage, title)
        self._publish()
        before = self._step("perplexity before", self._perplexity_before)
        after = self._step("perplexity after", lambda: self._perplexity(self.engine))
        self._step("validation", self._validation)
        asked, swaps = self.options.questions, min(self.options.questions or _SWAPPED_QUESTIONS, _SWAPPED_QUESTIONS)
        test = self._step("test", lambda: self._evaluate(EasyVqa(self.easy_vqa, asked), asked))
        swapped = self._step("swapped", lambda: self._evaluate(SwappedEasyVqa(self.easy_vqa, swaps), swaps))
        self._step("examples", self._examples)
        small = self._step("int4", self._shrink)
        result = self._result(before, after, test, swapped, small)
        write_report(result, self.out)
        return with_images(result, self.out)

    def _claim(self) -> None:
        for folder in (self.out, *(self.out / name for name in ("steps", "data", *STAGES)), *self.out.glob("eval/*")):
            remove_partials(folder)
        # Earlier versions had spaces in these file names.
        for path in (self.out / "steps").glob("* *.json"):
            path.rename(self._step_file(path.stem))
        path = self.out / "quickstart.json"
        settings = self.options.settings()
        if path.is_file():
            before = read_json_object(path)
            # Earlier versions stored directories as given on the command line.
            changed = [
                f"{key}: {before.get(key)!r} -> {value!r}"
                for key, value in settings.items()
                if before.get(key) not in (value, getattr(self.options, key))
            ]
            if changed:
                raise ConfigError(
                    f"contains a run with other settings ({'; '.join(changed)})",
                    file=self.out,
                    hint="choose another --output directory, or delete this one",
                )
        write_json(path, settings)

    def _step(self, name: str, work: Callable[[], Any]) -> Any:
        """Return the result of a step, from its file if it exists, else by calling `work`."""
        path = self._step_file(name)
        if path.is_file():
            return _read_step(path)["result"]
        began = time.monotonic()
        result = work()
        write_json(path, {"name": name, "seconds": round(time.monotonic() - began, 2), "result": result})
        return result

    def _step_file(self, name: str) -> Path:
        """Return the path of a step's file."""
        return self.out / "steps" / f"{name.replace(' ', '-')}.json"

    def _note(self, name: str, seconds: float) -> None:
        """Add to the time of a step without a result."""
        path = self._step_file(name)
        before = _read_step(path, result=False)["seconds"] if path.is_file() else 0.0
        write_json(path, {"name": name, "seconds": round(before + seconds, 2)})

    def _parts(self) -> None:
        began = time.monotonic()
        self.llm = resolve_component(self.options.llm, partial(components.obtain_llm, self.cache, self.events))
        self.vision = resolve_component(self.options.vision, partial(components.obtain_vision, self.cache, self.events))
        self.easy_vqa = easy_vqa.obtain_easy_vqa(self.cache, self.events)
        self.images = self.easy_vqa / "train" / "images"
        self._note("parts", time.monotonic() - began)

    def _data(self) -> dict[str, int]:
        link = self.out / "data" / "images"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        # The recipes name images below this link, so that `vila train starter/3_sft` works too.
        link.symlink_to(self.images.resolve(), target_is_directory=True)
        return write_stage_data(self.easy_vqa, self.out / "data", self.options.seed)

    def recipe(self, stage: str) -> Recipe:
        """Load the packaged recipe of a stage, with the paths, seed and token budget of this run."""
        plain = load_recipe(f"starter/{stage}")
        overrides = [
            f"seed={self.options.seed}",
            f"output.dir={self.out / stage}",
            f"budget.tokens={round(plain.budget.tokens * self.options.minutes / FULL_MINUTES)}",
        ]
        for number, entry in enumerate(plain.data.mixture):
            overrides.append(f"data.mixture.{number}.path={self.out / 'data' / Path(entry.path).name}")
            overrides.append(f"data.mixture.{number}.image_root={self.out / 'data' / 'images'}")
        index = STAGES.index(stage)
        if index:
            overrides.append(f"model.path={self.out / STAGES[index - 1] / 'model'}")
        else:
            overrides += [f"model.llm={self.llm}", f"model.vision={self.vision}"]
        return load_recipe(f"starter/{stage}", overrides)

    def _train(self, stage: str, title: str) -> None:
        recipe = self.recipe(stage)
        if not is_finished(recipe):
            began = time.monotonic()
            training = build(recipe, events=self.events)
            self._note(f"set-up {stage}", time.monotonic() - began)
            self.events.log(
                f"{title}: {training.num_trainable:,} parameters learn from {recipe.budget.tokens:,} tokens"
            )
            training.train()
        self._step(f"caption {stage}", lambda: self._caption(Engine.load(model_dir(recipe)), stage))

    def _caption(self, engine: Engine, stage: str) -> dict[str, float]:
        images = labelled_images(easy_vqa.group_by_image(easy_vqa.read_questions(self.easy_vqa, "train")))
        held_out = [image for image in images if is_validation(image.image_id)][:_VALIDATION_IMAGES]
        with task(self.events, f"caption check after {stage}"):
            return caption_nll(engine, held_out, self.images)

    def _publish(self) -> None:
        """Link or copy the last stage's model to `out/model`, with a model card."""
        target = self.out / "model"
        if not target.is_dir():
            with atomic_path(target) as part:
                shutil.copytree(self.out / STAGES[-1] / "model", part, copy_function=_link)
                save_model_card(part, self.recipe(STAGES[-1]), self._card_facts())

    def _card_facts(self) -> dict[str, Any]:
        """Return the contents of the model card in addition to the recipe."""
        licences = [asdict(one) for one in data_licences() if one.name == "easy-VQA"]
        drawn = [entry.path for entry in self.recipe(STAGES[-1]).data.mixture if entry.image_root]
        finished = read_json_object(self.out / STAGES[-1] / "finished.json")
        return {**finished, "data_licences": dict.fromkeys(drawn, licences)}

    @cached_property
    def engine(self) -> Engine:
        """Engine of the trained model, loaded on first use."""
        return Engine.load(self.out / "model")

    def _perplexity(self, engine: Engine) -> dict[str, float]:
        return perplexity(engine, english_eval(), PERPLEXITY_TOKENS)

    def _perplexity_before(self) -> dict[str, float]:
        first = self.recipe(STAGES[0])
        fields = first.model.model_dump(exclude={"path", "projector_init"})
        checkpoint = open_components(**fields)
        model, processor = build_components(checkpoint, first.seed), checkpoint.processor
        with task(self.events, "perplexity of the untouched LLM"):
            return self._perplexity(Engine(model.to(choose_dtype("auto")), processor))

    def _evaluate(self, benchmark: EasyVqa, questions: int = 0) -> dict[str, Any]:
        where, model = result_dir(self.out / "eval", benchmark.name, questions), model_hash(self.out / "model")
        result = run_benchmark(self.engine, benchmark, where, model_id=model, events=self.events)
        assert result  # None only in distributed evaluation
        return {**result.scores, "seconds": round(result.seconds, 1)}

    def _validation(self) -> dict[str, Any]:
        """Measure the accuracy on held-out training images."""
        benchmark = EasyVqa(self.easy_vqa, 0, "train")
        kept = sorted({int(i.group) for i in benchmark.items() if is_validation(int(i.group))})[:_VALIDATION_IMAGES]
        benchmark.keep({str(group) for group in kept})
        benchmark.name = "easy_vqa_validation"
        return self._evaluate(benchmark)

    def _examples(self) -> dict[str, Any]:
        """Answer three questions about test images, and one few-shot prompt with two examples."""
        items = EasyVqa(self.easy_vqa, 0, "test").items()
        asked = _three_kinds(items)
        answers = self.engine.generate_batch([i.messages for i in asked], max_new_tokens=8)
        shots, question = _few_shot(items)
        answer = self.engine.generate([*shots, *question.messages], max_new_tokens=8)
        return {
            "examples": [self._shown(item, answer) for item, answer in zip(asked, answers, strict=True)],
            "few_shot": {
                "images": [
                    portable_path(str(p.source), self.out)
                    for m in (*shots, *question.messages)
                    for p in m.parts
                    if isinstance(p, Image)
                ],
                "prompt": "\n".join(
                    f"<image> {m.text}" if m.role == "user" else m.text for m in (*shots, *question.messages)
                ),
                "answer": answer,
                "truth": question.truth,
            },
        }

    def _shrink(self) -> dict[str, Any] | None:
        """Quantize the model to INT4 and compare both; None if it cannot be quantized."""
        self.__dict__.pop("engine", None)
        whole, small = self.out / "model", self.out / "model-int4"
        if not quantize_model(whole, small, self.events):
            return None
        answered = result_dir(self.out / "eval", "easy_vqa", self.options.questions) / "predictions.jsonl"
        where = self.out / "eval" / "easy_vqa_int4"
        found = compare_answers(whole, small, self.easy_vqa, answered, where, self.options.questions, self.events)
        found["example"]["image"] = portable_path(found["example"]["image"], self.out)
        return found

    def _result(self, before: Any, after: Any, test: Any, swapped: Any, small: Any) -> dict[str, Any]:
        files = sorted((self.out / "steps").glob("*.json"))
        steps = [(path.stem, _read_step(path, result=False)) for path in files]
        seconds = {step.get("name", stem): step["seconds"] for stem, step in steps}
        stages = [self._stage_facts(stage, title) for stage, title in zip(STAGES, TITLES, strict=True)]
        for stage in stages:
            seconds[f"training {stage['name']}"] = stage["seconds"]
        examples = _read_step(self._step_file("examples"))["result"]
        model, small_model, saved = (
            quote(str(self.out / name)) for name in ("model", "model-int4", f"{STAGES[-1]}/recipe.yaml")
        )
        rise = 100 * (after["perplexity"] / before["perplexity"] - 1)
        return {
            "accuracy": test["accuracy"],
            "accuracy_by_type": test["by_type"],
            "majority_accuracy": test["majority"],
            "blind_accuracy": test["blind"],
            "swapped_accuracy": swapped["accuracy"],
            "validation_accuracy": _read_step(self._step_file("validation"))["result"]["accuracy"],
            "questions": test["count"],
            "seconds": seconds,
            "tokens_per_second": {s["name"]: round(s["tokens"] / max(s["seconds"], 1e-3), 1) for s in stages},
            "machine": _machine(),
            "stages": stages,
            "perplexity": {
                "text_sha256": text_sha256("english_eval.txt"),
                "tokens": after["tokens"],
                "before": before["perplexity"],
                "after": after["perplexity"],
                "rise_percent": rise,
            },
            "examples": [*examples["examples"], *self._gallery()],
            "few_shot": examples["few_shot"],
            "int4": small,
            "seed": self.options.seed,
            "model_sha256": sha256_tree(self.out / "model", "*.safetensors"),
            "commands": {
                "Talk to the model": f"vila chat {model}",
                **({"Talk to it in 4 bits": f"vila chat {small_model}"} if small else {}),
                "Score it again": f"vila eval {model} --benchmarks easy_vqa",
                "Train a stage with your own settings": f"vila train {saved} stage.lr=1e-4 output.dir=runs/mine",
                "See the 7B recipe": "vila train vila_7b/1_align --dry-run",
            },
        }

    def _stage_facts(self, stage: str, title: str) -> dict[str, Any]:
        rows = read_metrics(self.out / stage / "metrics.jsonl")
        progress = read_json_object(self.out / stage / "finished.json")["progress"]
        return {
            "name": stage,
            "title": title,
            "tune": list(self.recipe(stage).stage.tune),
            "tokens": progress["tokens"],
            "steps": progress["step"],
            "seconds": round(progress["seconds"], 3),
            "loss": [[row["tokens_seen"], row["loss"]] for row in rows],
            "caption_nll": _read_step(self._step_file(f"caption {stage}"))["result"],
        }

    def _gallery(self) -> list[dict[str, Any]]:
        """Return test questions with answers: up to 6 wrong ones, then right ones about other images, 12 in total."""
        where = result_dir(self.out / "eval", "easy_vqa", self.options.questions)
        items = EasyVqa(self.easy_vqa, self.options.questions, "test").items()
        predictions = read_texts(where / "predictions.jsonl", [item.id for item in items])
        wrong = [item for item in items if predictions[item.id] != item.truth][:6]
        right = {item.group: item for item in items if predictions[item.id] == item.truth}
        return [self._shown(item, predictions[item.id]) for item in [*wrong, *list(right.values())[: 12 - len(wrong)]]]

    def _shown(self, item: Item, answer: str) -> dict[str, Any]:
        image = item.messages[0].parts[0]
        assert isinstance(image, Image)
        source = portable_path(str(image.source), self.out)
        return {"image": source, "question": item.messages[-1].text, "answer": answer, "truth": item.truth}


def _read_step(path: Path, *, result: bool = True) -> dict[str, Any]:
    """Read the file of a finished step. Raises DataError naming the missing field."""
    step = read_json_object(path)
    seconds = step.get("seconds")
    if not isinstance(seconds, int | float) or (result and "result" not in step):
        field = "result" if isinstance(seconds, int | float) else "seconds"
        raise DataError("missing in the file of a step", file=path, field=field, hint="delete it to run the step again")
    return step


def _three_kinds(items: Sequence[Item]) -> list[Item]:
    """Select one question of each kind, about three images."""
    chosen: dict[str, Item] = {}
    for kind in ("what shape", "what color", "yes/no color"):
        item = next(item for item in items if item.category == kind and item.group not in chosen)
        chosen[item.group] = item
    return list(chosen.values())


def _few_shot(items: Sequence[Item]) -> tuple[list[Message], Item]:
    """Select two answered questions about different images, and a third one of the same kind with another answer."""
    chosen: dict[str, Item] = {}
    for item in items:
        if item.category == "what color" and item.truth not in chosen:
            chosen[item.truth] = item
    first, second, third = list(chosen.values())[:3]
    return [m for item in (first, second) for m in (*item.messages, Message.of("assistant", item.truth))], third


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _machine() -> dict[str, Any]:
    import torch

    return {
        **system_info(),
        "dtype": str(choose_dtype("auto")).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
