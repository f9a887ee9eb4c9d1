"""Model card: `README.md` next to the weights with base models, training settings, scores, data and licences."""

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

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_PART_LICENCE = re.compile(r"\(licence: ([^()]+)\)\.\s*\Z")
"""Licence at the end of the README that `vila quickstart` writes for a downloaded component."""
CARD_KEY = "vila_base_models"
"""Front-matter field of our model cards with the base models and their licences."""
_MAX_STAGES = 10
"""Maximum number of previous stages whose recipes are read."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model of the trained model.

    name:    hub id or directory, as in the recipe.
    hub:     hub id if known, else empty.
    licence: name of the licence, or "not known".
    note:    further conditions, or the source of the licence.
    """

    name: str
    hub: str
    licence: str
    note: str = ""


def base_models(recipe: Recipe) -> list[BaseModel]:
    """Return the LLM and the tower, traced through the recipes of previous stages; else the model of `model.path`.

    A model without a recipe in its directory is traced through its model card.
    """
    names = _names(recipe.model.model_dump(), _MAX_STAGES)
    return [base for name in names for base in _from_card(name) or [_from_name(name)]]


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


def _from_card(name: str) -> list[BaseModel]:
    """Return the base models in the model card of a directory; empty without one of our cards."""
    folder = Path(name).expanduser()
    for readme in (folder / "README.md", folder / "model" / "README.md"):
        rows = _front_matter(readme).get(CARD_KEY)
        if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
            return [BaseModel(*(str(row.get(key) or "") for key in ("name", "hub", "licence", "note"))) for row in rows]
    return []


def _front_matter(readme: Path) -> dict[str, Any]:
    return read_front_matter(readme.read_text(encoding="utf-8", errors="replace")) if readme.is_file() else {}


def _from_name(name: str) -> BaseModel:
    folder = Path(name)
    if folder.is_dir():
        found = _licence_in(folder)
        if found:
            return BaseModel(name, "", found, f"from {folder.name}/README.md")
        # A copy of a hub model has its name.
        name_of = {hub.rpartition("/")[2].lower(): hub for hub in _table()}
        hub = name_of.get(folder.name.lower(), "")
        if hub:
            return BaseModel(name, hub, _table()[hub]["licence"], _table()[hub]["note"])
        return BaseModel(name, "", "not known", "see its LICENSE file" if (folder / "LICENSE").is_file() else "")
    entry = _table().get(name)
    hub = name if _HUB_ID.fullmatch(name) else ""
    return BaseModel(name, hub, entry["licence"], entry["note"]) if entry else BaseModel(name, hub, "not known")


def _licence_in(folder: Path) -> str:
    """Return the licence in a README: from its front matter, or as `vila quickstart` writes it; else empty."""
    readme = folder / "README.md"
    licence = _front_matter(readme).get("license")
    if isinstance(licence, str) and licence != "other":
        return licence
    if (folder / "part.json").is_file() and readme.is_file():
        match = _PART_LICENCE.search(readme.read_text(encoding="utf-8", errors="replace"))
        return match[1] if match else ""
    return ""


def read_front_matter(text: str) -> dict[str, Any]:
    """Return the YAML front matter of a README; empty if it has none, or one that is not valid."""
    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return front if isinstance(front, dict) else {}


@cache
def _table() -> dict[str, dict[str, str]]:
    text = (resources.files("vila.train") / "model_licences.json").read_text(encoding="utf-8")
    table: dict[str, dict[str, str]] = json.loads(text)
    return table


_HUB_DATA = re.compile(r"https://huggingface\.co/datasets/([\w.-]+/[\w.-]+)/?")
_LIBRARIES = {"llava-hf": "transformers"}
"""Library that loads a layout, where it is not ours."""


def save_model_card(folder: Path, recipe: Recipe, metadata: Mapping[str, Any]) -> None:
    """Write `README.md` into a model's directory.

    metadata: optional entries:
        progress:      from `finished.json`: step, tokens, samples, supervised, seconds, bad_steps.
        passes, versions, ranks, dropped, truncated: from `finished.json`.
        scores:        records of `evaluations.jsonl` of these weights.
        data_licences: by path of a data set, records with name, source, licence and forbids.
        command:       command that trained the model; default: one that trains it again from its recipe.
    """
    run = recipe.output.dir
    bases = [replace(base, name=portable_path(base.name, run)) for base in base_models(recipe)]
    licences: Mapping[str, Sequence[Mapping[str, str]]] = metadata.get("data_licences") or {}
    parts = [
        _card_front_matter(recipe, bases, licences),
        f"# {recipe.name}",
        _summary(recipe, bases),
        "Run in the directory of this file:\n\n```bash\nvila chat .\n```",
        _section("Training", _card_table(("", ""), [*_settings(recipe), *_progress(metadata)])),
        _section("Scores", _scores(metadata)),
        _section("Data", _data(recipe, licences, run)),
        _section("Licences", _licences(bases)),
        _section("Reproduce", _retrain(recipe, metadata, run)),
    ]
    write_text(folder / "README.md", "\n\n".join(filter(None, parts)) + "\n")


def _card_front_matter(
    recipe: Recipe, bases: Sequence[BaseModel], licences: Mapping[str, Sequence[Mapping[str, str]]]
) -> str:
    sources = [row.get("source", "") for rows in licences.values() for row in rows]
    found = [match[1] for source in sources if (match := _HUB_DATA.fullmatch(source))]
    front: dict[str, Any] = {
        # The combined terms of components and data are for the reader to judge; the card lists them.
        "license": "other",
        "license_name": "those-of-base-models-and-data",
        "base_model": [base.hub for base in bases if base.hub],
        "datasets": list(dict.fromkeys(found)),
        "pipeline_tag": "image-text-to-text",
        "library_name": "peft" if recipe.stage.lora.rank else _LIBRARIES.get(recipe.output.layout, "vila"),
        "tags": ["vila", *(["lora"] if recipe.stage.lora.rank else [])],
        # Read by a later stage that starts from this model, wherever it is then.
        CARD_KEY: [asdict(base) for base in bases],
    }
    present = {key: value for key, value in front.items() if value}
    return f"---\n{yaml.safe_dump(present, sort_keys=False, allow_unicode=True)}---"


def _summary(recipe: Recipe, bases: Sequence[BaseModel]) -> str:
    made = " and ".join(f"`{base.name}`" for base in bases)
    kind = "An adapter for a visual language model" if recipe.stage.lora.rank else "A visual language model"
    return f"{kind} trained from {made}. Trained in this stage: {', '.join(recipe.stage.tune)}."


def _settings(recipe: Recipe) -> list[tuple[str, str]]:
    stage, data, batch, optim, budget = recipe.stage, recipe.data, recipe.batch, recipe.optim, recipe.budget
    size = f"{batch.rows:,} packed rows" if batch.rows else f"{batch.samples:,} samples"
    parts = f" ({', '.join(stage.llm_parts)} of the llm)" if stage.llm_parts else ""
    lora = f"rank {stage.lora.rank}, alpha {stage.lora.alpha:g}, dropout {stage.lora.dropout:g}"
    rows = [
        ("trained modules", ", ".join(stage.tune) + parts),
        ("LoRA adapters", f"{lora}, {stage.lora.bits}-bit base weights" if stage.lora.rank else ""),
        ("peak learning rate", f"{stage.lr:g}" + (f", projector {stage.lr_projector:g}" if stage.lr_projector else "")),
        ("schedule", f"linear warm-up over {write_percent(optim.warmup_ratio)} of the run, then cosine to zero"),
        ("AdamW", f"betas {optim.beta1:g}, {optim.beta2:g}; weight decay {optim.weight_decay:g}"),
        ("gradient clipping", f"{optim.max_grad_norm:g}"),
        ("batch", f"{size}, at most {data.max_length:,} tokens each"),
        ("budget", f"{budget.tokens:,} tokens" if budget.tokens else f"{budget.epochs:g} epochs"),
        ("template", data.template or recipe.model.template),
        ("dtype", f"{recipe.compute.dtype}, float32 master weights"),
        ("seed", str(recipe.seed)),
    ]
    return [(name, value) for name, value in rows if value]


def _progress(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    progress: Mapping[str, Any] = metadata.get("progress") or {}
    counts = {"steps": "step", "samples": "samples", "tokens": "tokens", "supervised tokens": "supervised"}
    rows = [(label, f"{progress[name]:,}") for label, name in counts.items() if progress.get(name) is not None]
    if metadata.get("passes") is not None:
        rows.append(("passes over the data", f"{metadata['passes']:.3g}"))
    ranks = metadata.get("ranks", 1)
    if progress.get("seconds"):
        rows.append(("time", f"{write_seconds(progress['seconds'])} on {ranks} process{'es' * (ranks != 1)}"))
    skipped = {"skipped steps": progress.get("bad_steps"), "samples dropped as too long": metadata.get("dropped")}
    skipped["samples truncated as too long"] = metadata.get("truncated")
    rows += [(label, f"{count:,}") for label, count in skipped.items() if count]
    versions: Mapping[str, Any] = metadata.get("versions") or {}
    return [*rows, *((str(name), str(value)) for name, value in versions.items())]


def _scores(metadata: Mapping[str, Any]) -> str:
    rows = [
        (row["benchmark"], f"{write_number(row['score'])} {row.get('unit', '')}".strip(), row.get("items", ""))
        for row in metadata.get("scores") or ()
        if row.get("score") is not None
    ]
    if not rows:
        return "Not evaluated in this run; use `vila eval`."
    return _card_table(("benchmark", "score", "questions"), rows)


def _data(recipe: Recipe, licences: Mapping[str, Sequence[Mapping[str, str]]], run: Path) -> str:
    rows = []
    for entry in recipe.data.mixture:
        weight = f"weight {entry.weight:g}" if entry.weight is not None else f"times {entry.repeat:g}"
        known = licences.get(entry.path) or ({"name": "", "licence": "not known", "forbids": "ask its owner"},)
        for number, row in enumerate(known):
            path = portable_path(entry.path, run) if Path(entry.path).is_absolute() else entry.path
            own = (f"`{path}`", weight) if not number else ("", "")
            rows.append((*own, _linked(row), row.get("licence", ""), row.get("forbids", "")))
    return _card_table(("path", "sampling", "data set", "licence", "forbids"), rows)


def _linked(row: Mapping[str, str]) -> str:
    name, source = row.get("name", ""), row.get("source", "")
    return f"[{name}]({source})" if source.startswith("https://") else name


def _licences(bases: Sequence[BaseModel]) -> str:
    rows = [(f"`{base.name}`", base.licence, base.note) for base in bases]
    words = (
        "The weights are subject to the licences of their base models and to the terms of the data above. The table "
        "lists what this version of the software knows; read the licences before you redistribute the model or use it "
        "commercially."
    )
    return f"{_card_table(('base model', 'licence', 'note'), rows)}\n\n{words}"


def _retrain(recipe: Recipe, metadata: Mapping[str, Any], run: Path) -> str:
    ranks = int(metadata.get("ranks") or 1)
    start = f"torchrun --nproc-per-node {ranks} -m vila" if ranks > 1 else "vila"
    command = metadata.get("command") or f"{start} train recipe.yaml output.dir=runs/reproduced"
    words = (
        "Save the complete recipe as `recipe.yaml`. Relative paths are relative to the working directory of the "
        "training command; absolute paths were rewritten relative to the directory of the run."
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
