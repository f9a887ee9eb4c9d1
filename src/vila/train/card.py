"""The model card: a README.md beside the weights that says what they are, what made them, and what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from vila.config.load import recipe_to_yaml
from vila.config.schema import Recipe
from vila.core.files import portable_path, write_text
from vila.report.scale import write_number, write_percent, write_seconds
from vila.train.licences import CARD_KEY, BaseModel, base_models

_HUB_DATA = re.compile(r"https://huggingface\.co/datasets/([\w.-]+/[\w.-]+)/?")
_LIBRARIES = {"llava-hf": "transformers"}
"""What loads a layout other than ours."""


def write_card(folder: Path, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Write `README.md` into a model's directory.

    facts, each of which may be missing, and is then not spoken of:
        progress:      what `finished.json` has: step, tokens, samples, supervised, seconds, bad_steps.
        passes:        how often the data were gone through.
        versions, ranks, dropped, truncated: from there too.
        scores:        rows of `evaluations.jsonl` that were measured on these weights.
        data_licences: by path of a data set, rows with name, source, licence and forbids.
        command:       the command that made the model; else one that makes it again from its recipe.
    """
    run = recipe.output.dir
    bases = [replace(base, name=portable_path(base.name, run)) for base in base_models(recipe)]
    licences: Mapping[str, Sequence[Mapping[str, str]]] = facts.get("data_licences") or {}
    parts = [
        _front_matter(recipe, bases, licences),
        f"# {recipe.name}",
        _summary(recipe, bases),
        "In the directory of this file:\n\n```bash\nvila chat .\n```",
        _section("Training", _table(("", ""), [*_settings(recipe), *_progress(facts)])),
        _section("Scores", _scores(facts)),
        _section("Data", _data(recipe, licences, run)),
        _section("Licences", _licences(bases)),
        _section("To make it again", _again(recipe, facts, run)),
    ]
    write_text(folder / "README.md", "\n\n".join(filter(None, parts)) + "\n")


def _front_matter(
    recipe: Recipe, bases: Sequence[BaseModel], licences: Mapping[str, Sequence[Mapping[str, str]]]
) -> str:
    sources = [row.get("source", "") for rows in licences.values() for row in rows]
    found = [match[1] for source in sources if (match := _HUB_DATA.fullmatch(source))]
    facts: dict[str, Any] = {
        # What the parts and the data allow together is for the reader to judge; the card lists them.
        "license": "other",
        "license_name": "those-of-base-models-and-data",
        "base_model": [base.hub for base in bases if base.hub],
        "datasets": list(dict.fromkeys(found)),
        "pipeline_tag": "image-text-to-text",
        "library_name": "peft" if recipe.stage.lora.rank else _LIBRARIES.get(recipe.output.layout, "vila"),
        "tags": ["vila", *(["lora"] if recipe.stage.lora.rank else [])],
        # A stage that starts from this model reads them again, wherever the model is then.
        CARD_KEY: [asdict(base) for base in bases],
    }
    kept = {key: value for key, value in facts.items() if value}
    return f"---\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)}---"


def _summary(recipe: Recipe, bases: Sequence[BaseModel]) -> str:
    made = " and ".join(f"`{base.name}`" for base in bases)
    kind = "An adapter for a visual language model" if recipe.stage.lora.rank else "A visual language model"
    return f"{kind} made from {made}. This stage trained: {_list(recipe.stage.tune)}."


def _settings(recipe: Recipe) -> list[tuple[str, str]]:
    stage, data, batch, optim, budget = recipe.stage, recipe.data, recipe.batch, recipe.optim, recipe.budget
    size = f"{batch.rows:,} packed rows" if batch.rows else f"{batch.samples:,} samples"
    lora = f"rank {stage.lora.rank}, alpha {stage.lora.alpha:g}, dropout {stage.lora.dropout:g}"
    rows = [
        ("learns", _list(stage.tune) + (f" ({_list(stage.llm_parts)} of the llm)" if stage.llm_parts else "")),
        ("adapters", f"{lora}, {stage.lora.bits} bits below" if stage.lora.rank else ""),
        ("peak learning rate", f"{stage.lr:g}" + (f", projector {stage.lr_projector:g}" if stage.lr_projector else "")),
        ("schedule", f"linear warm-up over {write_percent(optim.warmup_ratio)} of the run, then cosine to zero"),
        ("AdamW", f"betas {optim.beta1:g}, {optim.beta2:g}; weight decay {optim.weight_decay:g}"),
        ("gradients clipped to", f"{optim.max_grad_norm:g}"),
        ("batch", f"{size}, at most {data.max_length:,} tokens each"),
        ("budget", f"{budget.tokens:,} tokens" if budget.tokens else f"{budget.epochs:g} epochs"),
        ("template", data.template or recipe.model.template),
        ("number type", f"{recipe.compute.dtype}, float32 masters"),
        ("seed", str(recipe.seed)),
    ]
    return [(name, value) for name, value in rows if value]


def _progress(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    progress: Mapping[str, Any] = facts.get("progress") or {}
    counts = {"steps": "step", "samples": "samples", "tokens": "tokens", "supervised tokens": "supervised"}
    rows = [(label, f"{progress[name]:,}") for label, name in counts.items() if progress.get(name) is not None]
    if facts.get("passes") is not None:
        rows.append(("passes over the data", f"{facts['passes']:.3g}"))
    ranks = facts.get("ranks", 1)
    if progress.get("seconds"):
        rows.append(("time", f"{write_seconds(progress['seconds'])} on {ranks} process{'es' * (ranks != 1)}"))
    skipped = {"steps left out": progress.get("bad_steps"), "samples left out as too long": facts.get("dropped")}
    skipped["samples cut as too long"] = facts.get("truncated")
    rows += [(label, f"{count:,}") for label, count in skipped.items() if count]
    versions: Mapping[str, Any] = facts.get("versions") or {}
    return [*rows, *((str(name), str(value)) for name, value in versions.items())]


def _scores(facts: Mapping[str, Any]) -> str:
    rows = [
        (row["benchmark"], f"{write_number(row['score'])} {row.get('unit', '')}".strip(), row.get("items", ""))
        for row in facts.get("scores") or ()
        if row.get("score") is not None
    ]
    if not rows:
        return "None were measured in this run. `vila eval` measures them."
    return _table(("benchmark", "score", "questions"), rows)


def _data(recipe: Recipe, licences: Mapping[str, Sequence[Mapping[str, str]]], run: Path) -> str:
    rows = []
    for entry in recipe.data.mixture:
        share = f"weight {entry.weight:g}" if entry.weight is not None else f"times {entry.repeat:g}"
        known = licences.get(entry.path) or ({"name": "", "licence": "not known", "forbids": "ask its owner"},)
        for number, row in enumerate(known):
            path = portable_path(entry.path, run) if Path(entry.path).is_absolute() else entry.path
            own = (f"`{path}`", share) if not number else ("", "")
            rows.append((*own, _linked(row), row.get("licence", ""), row.get("forbids", "")))
    return _table(("path", "share", "data set", "licence", "forbids"), rows)


def _linked(row: Mapping[str, str]) -> str:
    name, source = row.get("name", ""), row.get("source", "")
    return f"[{name}]({source})" if source.startswith("https://") else name


def _licences(bases: Sequence[BaseModel]) -> str:
    rows = [(f"`{base.name}`", base.licence, base.note) for base in bases]
    words = (
        "These weights stay under the licences of the models that they were made from, and under what the data above "
        "allows. The table repeats what is known to this version of the software; read the licences themselves before "
        "you pass the model on or use it commercially."
    )
    return f"{_table(('base model', 'licence', 'note'), rows)}\n\n{words}"


def _again(recipe: Recipe, facts: Mapping[str, Any], run: Path) -> str:
    ranks = int(facts.get("ranks") or 1)
    start = f"torchrun --nproc-per-node {ranks} -m vila" if ranks > 1 else "vila"
    command = facts.get("command") or f"{start} train recipe.yaml output.dir=runs/again"
    words = (
        "Save the recipe, which is whole, as `recipe.yaml`. Its paths are those of the machine that trained: relative "
        "to where the command was run, or, where they were absolute, to the directory of the run."
    )
    fence = "```"
    body = f"<details><summary>recipe.yaml</summary>\n\n{fence}yaml\n{recipe_to_yaml(recipe, run)}{fence}\n\n</details>"
    return f"{fence}bash\n{command}\n{fence}\n\n{words}\n\n{body}"


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
