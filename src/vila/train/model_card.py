"""The model card: a README.md beside the weights that says what they are, what made them, and what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vila.config.load import recipe_to_yaml
from vila.config.schema import Recipe
from vila.core.files import portable_path, write_text
from vila.core.reading import file_errors
from vila.report.numbers import write_number, write_percent, write_seconds

# --- licences
# Base models of a recipe and their licences: from the table of known models, or from files beside the weights.


_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_PART_LICENCE = re.compile(r"\(licence: ([^()]+)\)\.\s*\Z")
"""End of the README that `vila quickstart` writes beside a converted part."""
CARD_KEY = "vila_base_models"
"""Field of our own model cards that holds the base models with their licences."""
_DEEPEST = 10
"""Stages that a chain of recipes is followed through."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A model that weights come from.

    name:    hub id or directory, as the recipe has it.
    hub:     hub id where it is known, else empty.
    licence: in words; "not known" where nothing tells.
    note:    what else holds, or where it is from.
    """

    name: str
    hub: str
    licence: str
    note: str = ""


def base_models(recipe: Recipe) -> list[BaseModel]:
    """The language model and the tower, found through the recipes of the stages before; else the model of `path`.

    A model of ours that was moved away from its recipe is known by its card.
    """
    names = _names(recipe.model.model_dump(), _DEEPEST)
    return [base for name in names for base in _of_card(name) or [_described(name)]]


def _names(source: dict[str, Any], depth: int) -> list[str]:
    if not source.get("path"):
        return [name for name in (source.get("llm"), source.get("vision")) if name]
    before = Path(source["path"]).parent / "recipe.yaml"
    if depth and before.is_file():
        with file_errors(before):
            tree = yaml.safe_load(before.read_text(encoding="utf-8"))
        earlier = tree.get("model") if isinstance(tree, dict) else None
        if isinstance(earlier, dict) and (names := _names(earlier, depth - 1)):
            return names
    return [source["path"]]


def _of_card(name: str) -> list[BaseModel]:
    """The base models that the card of a model of ours lists; none where there is no such card."""
    folder = Path(name).expanduser()
    for readme in (folder / "README.md", folder / "model" / "README.md"):
        rows = _front_matter(readme).get(CARD_KEY)
        if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
            return [BaseModel(*(str(row.get(key) or "") for key in ("name", "hub", "licence", "note"))) for row in rows]
    return []


def _front_matter(readme: Path) -> dict[str, Any]:
    return read_front_matter(readme.read_text(encoding="utf-8", errors="replace")) if readme.is_file() else {}


def _described(name: str) -> BaseModel:
    folder = Path(name)
    if folder.is_dir():
        found = _beside(folder)
        if found:
            return BaseModel(name, "", found, f"as {folder.name}/README.md says")
        # A copy has the name of what it is a copy of.
        name_of = {hub.rpartition("/")[2].lower(): hub for hub in _table()}
        hub = name_of.get(folder.name.lower(), "")
        if hub:
            return BaseModel(name, hub, _table()[hub]["licence"], _table()[hub]["note"])
        return BaseModel(name, "", "not known", "see its LICENSE file" if (folder / "LICENSE").is_file() else "")
    facts = _table().get(name)
    hub = name if _HUB_ID.fullmatch(name) else ""
    return BaseModel(name, hub, facts["licence"], facts["note"]) if facts else BaseModel(name, hub, "not known")


def _beside(folder: Path) -> str:
    """The licence in the front matter of a README, as the hub's directories have it, or in that of a converted part."""
    readme = folder / "README.md"
    licence = _front_matter(readme).get("license")
    if isinstance(licence, str) and licence != "other":
        return licence
    if (folder / "part.json").is_file() and readme.is_file():
        match = _PART_LICENCE.search(readme.read_text(encoding="utf-8", errors="replace"))
        return match[1] if match else ""
    return ""


def read_front_matter(text: str) -> dict[str, Any]:
    """The YAML between the lines `---` at the head of a README; empty where there is none that can be read."""
    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        facts = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return facts if isinstance(facts, dict) else {}


@cache
def _table() -> dict[str, dict[str, str]]:
    text = (resources.files("vila.train") / "model_licences.json").read_text(encoding="utf-8")
    table: dict[str, dict[str, str]] = json.loads(text)
    return table


_HUB_DATA = re.compile(r"https://huggingface\.co/datasets/([\w.-]+/[\w.-]+)/?")
_LIBRARIES = {"llava-hf": "transformers"}
"""What loads a layout other than ours."""


def save_model_card(folder: Path, recipe: Recipe, facts: Mapping[str, Any]) -> None:
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
        _card_front_matter(recipe, bases, licences),
        f"# {recipe.name}",
        _summary(recipe, bases),
        "In the directory of this file:\n\n```bash\nvila chat .\n```",
        _section("Training", _card_table(("", ""), [*_settings(recipe), *_progress(facts)])),
        _section("Scores", _scores(facts)),
        _section("Data", _data(recipe, licences, run)),
        _section("Licences", _licences(bases)),
        _section("To make it again", _again(recipe, facts, run)),
    ]
    write_text(folder / "README.md", "\n\n".join(filter(None, parts)) + "\n")


def _card_front_matter(
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
    return _card_table(("benchmark", "score", "questions"), rows)


def _data(recipe: Recipe, licences: Mapping[str, Sequence[Mapping[str, str]]], run: Path) -> str:
    rows = []
    for entry in recipe.data.mixture:
        share = f"weight {entry.weight:g}" if entry.weight is not None else f"times {entry.repeat:g}"
        known = licences.get(entry.path) or ({"name": "", "licence": "not known", "forbids": "ask its owner"},)
        for number, row in enumerate(known):
            path = portable_path(entry.path, run) if Path(entry.path).is_absolute() else entry.path
            own = (f"`{path}`", share) if not number else ("", "")
            rows.append((*own, _linked(row), row.get("licence", ""), row.get("forbids", "")))
    return _card_table(("path", "share", "data set", "licence", "forbids"), rows)


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
    return f"{_card_table(('base model', 'licence', 'note'), rows)}\n\n{words}"


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


def _card_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
