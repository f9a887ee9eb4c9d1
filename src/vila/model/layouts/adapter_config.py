"""PEFT's adapter_config.json: LoRA features that are merged exactly; all others are rejected by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vila.core.errors import LayoutError
from vila.core.reading import Fields

CONFIG_FILE: Final = "adapter_config.json"
MERGE_WITH_PEFT: Final = "merge it with PEFT (merge_and_unload) and save the whole model"

_UNCHANGED_BASE: Final = ("gaussian", "eva", "orthogonal", "mica")
_CHANGED_BASE: Final = ("pissa", "olora")
_CONVERT: Final = (
    "save it again where it was trained, with path_initial_model_for_weight_conversion, or merge it there with PEFT"
)
HANDLED: Final = (
    *("peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", "rank_pattern"),
    *("alpha_pattern", "init_lora_weights", "use_dora", "bias", "lora_bias", "modules_to_save"),
    *("trainable_token_indices", "ensure_weight_tying", "target_parameters"),
)
"""Keys that affect the merge."""
WITHOUT_EFFECT: Final = (
    # About training, or which modules have adapters, which follows from the weight names.
    *("task_type", "auto_mapping", "peft_version", "inference_mode", "target_modules", "exclude_modules"),
    *("lora_dropout", "layers_to_transform", "layers_pattern", "runtime_config"),
    # PEFT itself sets it to false for the Linears that our models are made of.
    "fan_in_fan_out",
    # Only used together with other keys, which are rejected.
    *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    # Options that ms-swift adds for its optimizer.
    *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),
)
"""Keys that do not affect a trained adapter."""
_PATTERN: Final = r"(.*\.)?({})$"
_MAX_PATTERN: Final = 500
_QUANTIFIER: Final = re.compile(r"[*+{]|(?<!\()\?")
_QUANTIFIED_GROUP: Final = re.compile(r"\)[*+?{]")


@dataclass(frozen=True)
class AdapterConfig:
    """Settings of a LoRA adapter.

    init:          "pissa" or "olora" if PEFT subtracts the initial adapter from the base when it loads, else empty.
    whole_modules: PEFT's `modules_to_save`: name suffixes of modules whose weights are stored completely.
    has_biases:    biases of the base are stored.
    trained_rows:  stored rows of embeddings, by module name if given.
    keeps_tie:     weights that are tied in the base stay tied.
    """

    file: Path
    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    init: str
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    whole_modules: Sequence[str]
    has_biases: bool
    trained_rows: Sequence[int] | Mapping[str, Sequence[int]]
    keeps_tie: bool
    base: str
    revision: str | None

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's adapter."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return the scale of a module's adapter: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        rank = self.rank_of(module)
        return _by_pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def is_whole(self, weight: str) -> bool:
        """Return whether a weight belongs to a module that is stored completely."""
        parts = weight.split(".")
        modules = [".".join(parts[:length]) for length in range(1, len(parts))]
        return any(module.endswith(tuple(self.whole_modules)) for module in modules)

    def rows_of(self, module: str) -> Sequence[int]:
        """Return the stored rows of an embedding; empty if there are none."""
        if not isinstance(self.trained_rows, Mapping):
            return self.trained_rows
        return next((rows for name, rows in self.trained_rows.items() if module.endswith(name)), ())


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read adapter_config.json of a LoRA directory.

    Raises LayoutError with file, field and value for other adapter types, for features that cannot be merged exactly,
    and for invalid values. Unknown keys are rejected unless they are false or empty.
    """
    fields = Fields.of_file(folder / CONFIG_FILE, LayoutError)
    if fields.get("peft_type") != "LORA":
        raise fields.refusal("peft_type", expected="LORA", hint=MERGE_WITH_PEFT)
    for key in fields:
        if key not in HANDLED and key not in WITHOUT_EFFECT and fields[key] not in (None, False, 0, "", [], {}):
            raise fields.refusal(key, "not supported: it cannot be merged exactly", hint=MERGE_WITH_PEFT)
    init = _init(fields)
    if init == "pissa" and fields.number("lora_alpha", minimum=-1e9) <= 0:
        raise fields.refusal("lora_alpha", expected="more than 0, with init_lora_weights pissa")
    if any(not name.endswith(".weight") for name in fields.texts("target_parameters", [])):
        raise fields.refusal("target_parameters", expected="weights of Linears", hint=MERGE_WITH_PEFT)
    if "" in (whole_modules := fields.texts("modules_to_save", [])):
        raise fields.refusal("modules_to_save", expected="names of modules")
    return AdapterConfig(
        file=fields.file,
        rank=fields.integer("r", minimum=1, maximum=2**20),
        alpha=fields.number("lora_alpha", minimum=-1e9),
        use_rslora=fields.flag("use_rslora", False),
        use_dora=fields.flag("use_dora", False),
        init=init,
        rank_pattern=_pattern(fields, "rank_pattern", whole=True),
        alpha_pattern=_pattern(fields, "alpha_pattern", whole=False),
        whole_modules=whole_modules,
        has_biases=fields.text("bias", "none", choices=("none", "all", "lora_only")) != "none",
        trained_rows=_rows(fields),
        keeps_tie=fields.flag("ensure_weight_tying", False),
        base=fields.text("base_model_name_or_path", ""),
        revision=fields.text("revision", None) or None,
    )


def _init(fields: Fields) -> str:
    """Return the initialisation if it changes the base. Raises LayoutError if the change cannot be reproduced."""
    key = "init_lora_weights"
    value = fields.get(key, True)
    if value is None or isinstance(value, bool):
        return ""
    name = value.lower() if isinstance(value, str) else ""
    if name in (*_UNCHANGED_BASE, *_CHANGED_BASE):
        return name if name in _CHANGED_BASE else ""
    problem = "an initialisation that changes the base in a way that cannot be reproduced"
    expected = f"true, false, {', '.join((*_UNCHANGED_BASE, *_CHANGED_BASE))}"
    raise fields.refusal(key, problem, expected=expected, hint=_CONVERT)


def _pattern(fields: Fields, key: str, *, whole: bool) -> dict[str, Any]:
    """Read values by regular expression for module names; expressions with exponential cost are rejected."""
    section = fields.section(key)
    for pattern in section:
        costly = _QUANTIFIED_GROUP.search(pattern) or len(_QUANTIFIER.findall(pattern)) > 3
        try:
            re.compile(_PATTERN.format(pattern))
        except (re.error, RecursionError, OverflowError):
            costly = True
        if costly or len(pattern) > _MAX_PATTERN:
            expected = "module names, or expressions with at most three quantifiers and none after a group"
            raise section.refusal(pattern, expected=expected, hint=MERGE_WITH_PEFT)
    if whole:
        return {pattern: section.integer(pattern, minimum=1, maximum=2**20) for pattern in section}
    return {pattern: section.number(pattern, minimum=-1e9) for pattern in section}


def _by_pattern(values: Mapping[str, Any], module: str, default: Any) -> Any:
    # As PEFT's `get_pattern_key`: the first expression that matches the end of the name.
    return next((value for key, value in values.items() if re.match(_PATTERN.format(key), module)), default)


def _rows(fields: Fields) -> Sequence[int] | Mapping[str, Sequence[int]]:
    key = "trainable_token_indices"
    value = fields.get(key)
    groups = value if isinstance(value, dict) else {"": [] if value is None else value}
    for rows in groups.values():
        if not isinstance(rows, list) or any(type(row) is not int or not 0 <= row < 2**31 for row in rows):
            raise fields.refusal(key, expected="a list of row indices, or one per module")
        if len(set(rows)) < len(rows):
            raise fields.refusal(key, "duplicate row")
    return groups if isinstance(value, dict) else groups[""]
