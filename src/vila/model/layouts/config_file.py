"""config.json and generation_config.json: every value is checked before transformers reads it.

Only sizes and arithmetic settings are kept. Keys that could change anything else in transformers (code to import,
attention implementation, labels, outputs) are dropped.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vila.core.errors import LayoutError
from vila.core.reading import Fields, file_errors
from vila.families import FAMILIES, head_width
from vila.model.int4_weights import PackedWeight
from vila.model.settings import DEFAULTS, ModelSettings, plain_config
from vila.model.vision_sizes import TOWER_TYPES, has_cls_token, side_of
from vila.model.weights import Shape, TensorRef

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

MAX_LAYERS: Final = 1_000_000
"""Upper limit of layers in a config before comparison with the weights; configs contain lists of that length."""
MAX_POSITIONS: Final = 2**24
"""Upper limit of the context length, in tokens."""
_MAX_ROPE_FACTOR: Final = 10_000.0

_CONFIG, _GENERATION = "config.json", "generation_config.json"

_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "projection_dim", "mlp_ratio")
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "sliding_window")
_COUNTS = ("max_window_layers", "pretraining_tp")
_SIDES = ("image_size", "patch_size")
_EPSILONS = ("rms_norm_eps", "layer_norm_eps")
_INITIALISERS = ("initializer_range", "initializer_factor", "layerscale_value", "layer_scale_init_value")
_FRACTIONS = ("attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")
_FLAGS = (
    "attention_bias", "mlp_bias", "qkv_bias", "tie_word_embeddings", "use_cache", "use_sliding_window",
    "use_swiglu_ffn", "use_mask_token", "use_qk_norm", "use_mean_pooling", "use_absolute_position_embeddings",
)  # fmt: skip
_TOKEN_IDS = ("bos_token_id", "pad_token_id")

# Keys of every config class that are neither sizes nor arithmetic: they could change outputs, import code, or hang.
_LEFT_OUT = frozenset((
    "architectures", "auto_map", "attn_implementation", "experts_implementation", "chunk_size_feed_forward", "id2label",
    "is_encoder_decoder", "label2id", "num_labels", "output_attentions", "output_hidden_states", "per_layer_config",
    "problem_type", "return_dict", "transformers_version", "out_features", "out_indices", "_out_features",
    "_out_indices",
))  # fmt: skip
# Keys that config classes read without declaring them.
_ROPE_KEYS = ("rope_scaling", "rope_parameters")
_UNDECLARED = frozenset(("torch_dtype", "tie_word_embeddings", "rope_scaling", "rope_theta", "partial_rotary_factor"))
_TEXT_ATTRIBUTES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip

# Rotary position types with their required numbers: key, minimum and maximum.
_FACTOR = ("factor", 1.0, _MAX_ROPE_FACTOR)
_ROPE_NUMBERS: Mapping[str, tuple[tuple[str, float, float], ...]] = {
    "linear": (_FACTOR,),
    "dynamic": (_FACTOR,),
    "yarn": (_FACTOR,),
    "llama3": (_FACTOR, ("low_freq_factor", 0.0, 1e6), ("high_freq_factor", 0.0, 1e6)),
}
_ROPE_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def read_config(folder: Path) -> Fields:
    """Read config.json of a directory; empty if there is none. Raises LayoutError unless it is a JSON object."""
    path = folder / _CONFIG
    return Fields.of_file(path, LayoutError) if path.is_file() else Fields({}, path, error=LayoutError)


def text_config(fields: Fields, kind: str) -> Any:
    """Read the config of an LLM of type `kind` from an old or new config.json.

    Returns a PartConfig, or transformers' config for types and values that need it.

    Raises LayoutError with file, field and value for invalid values. `check_sizes` compares sizes with the weights.
    """
    if kind not in FAMILIES and not _is_causal_lm(kind):
        raise fields.refusal("model_type", f"transformers has no LLM of type {kind!r}")
    config = _part_config(fields, kind)
    if missing := [name for name in _TEXT_ATTRIBUTES if not isinstance(getattr(config, name, None), int)]:
        raise fields.refusal("model_type", f"LLMs of this type have no {', '.join(missing)}")
    return config


def _is_causal_lm(kind: str) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def tower_config(fields: Fields, kind: str) -> Any:
    """Read the config of a vision tower of type `kind`. Raises LayoutError as `text_config`."""
    if kind not in TOWER_TYPES:
        raise fields.refusal("model_type", f"no vision tower of type {kind!r}", expected=", ".join(TOWER_TYPES))
    return _part_config(fields, kind)


def _part_config(fields: Fields, kind: str) -> Any:
    _check_values(fields)
    _check_rope(fields)
    _check_heads(fields, kind)
    build = partial(_build_config, fields, kind)
    return plain_config(fields, kind, build) or build()


def _build_config(fields: Fields, kind: str) -> PretrainedConfig:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[kind]
    known = {field.name for field in dataclass_fields(config_class)} | _UNDECLARED | set(config_class.attribute_map)
    # transformers does not treat a null rotary setting as its default, and modifies nested objects in place.
    plain = {
        key: _without_nulls(fields[key]) if key in _ROPE_KEYS else copy.deepcopy(fields[key])
        for key in fields
        if key in known and key not in _LEFT_OUT and not (key in _UNDECLARED and fields[key] is None)
    }
    with file_errors(fields.file, LayoutError):
        return config_class(**plain)


def _default(kind: str, key: str) -> Any:
    if kind in DEFAULTS:
        return DEFAULTS[kind].get(key)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return getattr(CONFIG_MAPPING[kind], key, None)


def _check_heads(fields: Fields, kind: str) -> None:
    heads, width = (
        fields.integer(key, _default(kind, key), minimum=1) for key in ("num_attention_heads", "hidden_size")
    )
    if isinstance(heads, int) and isinstance(width, int) and width % heads and fields.get("head_dim") is None:
        raise fields.refusal("num_attention_heads", expected=f"a divisor of hidden_size, {width:,}")


def _without_nulls(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_nulls(item) for key, item in value.items() if item is not None}


_COMMON_ACTIVATIONS = ("silu", "gelu", "quick_gelu", "gelu_pytorch_tanh", "relu")
"""Activations that need no look into transformers, which takes seconds to import."""


def _check_values(fields: Fields) -> None:
    for key in fields.keys() & set(_SIZES):
        fields.integer(key, minimum=1)
    for key in _OPTIONAL_SIZES:
        fields.integer(key, None, minimum=1)
    for key in fields.keys() & {"num_hidden_layers"}:
        fields.integer(key, minimum=1, maximum=MAX_LAYERS)
    for key in fields.keys() & {"max_position_embeddings"}:
        fields.integer(key, minimum=1, maximum=MAX_POSITIONS)
    fields.integer("num_channels", 3, minimum=3, maximum=3)
    for key in _COUNTS:
        fields.integer(key, None)
    for key in fields.keys() & set(_SIDES):
        square_side(fields, key)
    for key in fields.keys() & set(_EPSILONS):
        fields.number(key, maximum=1.0)
    for key in fields.keys() & set(_INITIALISERS):
        fields.number(key)
    for key in _FRACTIONS:
        fields.number(key, 0.0, maximum=1.0)
    for key in fields.keys() & set(_FLAGS):
        fields.flag(key)
    for key in fields.keys() & {"hidden_act"}:
        if fields[key] not in _COMMON_ACTIVATIONS:
            from transformers.activations import ACT2FN

            fields.text(key, choices=sorted(ACT2FN))
    for key in ("dtype", "torch_dtype"):
        fields.text(key, None, choices=("float32", "float16", "bfloat16", "float64"))
    fields.texts("layer_types", None)
    for key in _TOKEN_IDS:
        fields.integer(key, None, minimum=-1)
    token_ids(fields, "eos_token_id")
    # torch rejects a padding index outside the embedding table.
    padding, rows = fields.integer("pad_token_id", None, minimum=-1), fields.integer("vocab_size", None)
    if padding is not None and rows is not None and padding >= rows:
        raise fields.refusal("pad_token_id", expected=f"an id below vocab_size, {rows:,}")


def square_side(fields: Fields, key: str) -> int:
    """Read the side of a square in pixels: an integer, or a list of two equal integers."""
    value = fields.get(key)
    side = value[0] if isinstance(value, list) and len(value) == 2 and value[0] == value[1] else value
    if isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= 2**31 - 1:
        raise fields.refusal(key, expected="a positive integer, or a list of two equal ones")
    return side


def token_ids(fields: Fields, key: str) -> list[int]:
    """Read a token id or a non-empty list of ids; [] if it is absent."""
    value = fields.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if value == [] or any(isinstance(id_, bool) or not isinstance(id_, int) or not -1 <= id_ < 2**31 for id_ in ids):
        raise fields.refusal(key, expected="a token id or a list of them")
    return ids


def _check_rope(fields: Fields) -> None:
    """Check rotary position settings under the old key (`rope_scaling`) and the new one."""
    _check_rotation(fields)
    for key in _ROPE_KEYS:
        section = fields.section(key)
        # Models with several attention types have one object per type.
        nested = bool(section) and all(isinstance(value, dict) for value in section.values())
        for rope in map(section.section, section) if nested else [section]:
            _check_one_rope(rope)


def _check_rotation(fields: Fields) -> None:
    fields.number("rope_theta", None, minimum=1.0, maximum=1e12)
    fields.number("partial_rotary_factor", None, minimum=0.01, maximum=1.0)


def _check_one_rope(rope: Fields) -> None:
    if not rope:
        return
    key = "rope_type" if rope.get("rope_type") is not None or "type" not in rope else "type"
    kind = rope.get(key)
    if kind is not None and kind not in ("default", *_ROPE_NUMBERS):
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rope.text(key, choices=("default", *ROPE_INIT_FUNCTIONS))
    kind = kind or "default"
    for name, least, greatest in _ROPE_NUMBERS.get(kind, ()):
        rope.number(name, minimum=least, maximum=greatest)
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise rope.refusal("high_freq_factor", expected=f"a number above low_freq_factor, {rope['low_freq_factor']}")
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            value = rope.get(name)
            rope.numbers(name, length=len(value) if isinstance(value, list) else 0, minimum=1e-6, maximum=1e6)
    _check_rotation(rope)
    rope.integer("original_max_position_embeddings", None, minimum=1, maximum=MAX_POSITIONS)
    for name in _ROPE_OPTIONAL:
        rope.number(name, None, maximum=1e6)
    if kind != "default":
        rope.number("factor", None, minimum=1.0, maximum=_MAX_ROPE_FACTOR)
    rope.flag("truncate", None)


_SAMPLING: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 1e3),
    "top_p": (0.0, 1.0),
    "top_k": (0, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "epsilon_cutoff": (0.0, 1.0),
    "eta_cutoff": (0.0, 1.0),
}
_LENGTHS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens")
_GENERATION_FLAGS = ("do_sample", "use_cache", "output_attentions", "output_hidden_states", "return_dict_in_generate")


_CHECKED_GENERATION_KEYS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens", "repetition_penalty",
    "transformers_version", "_from_model_config", *_LENGTHS, *_SAMPLING, *_GENERATION_FLAGS,
}  # fmt: skip
"""Keys of which transformers accepts every value that has passed our checks, except lengths of 0."""


def read_generation_config(folder: Path, ignored: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read generation_config.json of a directory without the keys `ignored`; empty if there is none.

    Sampling values without `do_sample`, as in the published LLaVA-1.5, are dropped: greedy decoding ignores them, and
    transformers refuses to save them. Raises LayoutError for values that `generate` does not accept.
    """
    path = folder / _GENERATION
    if not path.is_file():
        return {}
    fields = Fields.of_file(path, LayoutError).without(*ignored)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens"):
        token_ids(fields, key)
    for key in _LENGTHS:
        fields.integer(key, None)
    for key, (least, greatest) in _SAMPLING.items():
        fields.number(key, None, minimum=least, maximum=greatest)
    fields.number("repetition_penalty", None, minimum=1e-6, maximum=1e6)
    for key in _GENERATION_FLAGS:
        fields.flag(key, None)
    unused = () if fields.get("do_sample") else tuple(_SAMPLING)
    plain = {key: value for key, value in fields.items() if value is not None and key not in unused}
    if not plain.keys() <= _CHECKED_GENERATION_KEYS or 0 in (plain.get(key) for key in _LENGTHS):
        build_generation_config(plain, path)
    return plain


def build_generation_config(values: Mapping[str, Any], file: Path) -> GenerationConfig:
    """Build transformers' generation config. Raises LayoutError with the file for values that it rejects."""
    from transformers import GenerationConfig

    with file_errors(file, LayoutError):
        return GenerationConfig.from_dict(copy.deepcopy(dict(values)))


_LLM, _TOWER = "language_model.", "vision_tower."
_LLM_BLOCK = re.compile(r"language_model\.(?:model\.)?layers\.(\d+)\.")
_TOWER_BLOCK = re.compile(r"vision_tower\.encoder\.layers?\.(\d+)\.")
# Limits for a part without weights: its modules are built to list the missing weights by name.
_MAX_UNCHECKED_LAYERS, _MAX_UNCHECKED_POSITIONS = 1000, 2**20


@dataclass(frozen=True, slots=True)
class StoredShape:
    """A weight in a file: tensor name, file name, and shape in the model."""

    name: str
    file: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} in {self.file}"


def check_sizes(
    config: ModelSettings,
    refs: Mapping[str, TensorRef],
    int4: Mapping[str, PackedWeight],
    *,
    text: Fields,
    vision: Fields,
) -> None:
    """Compare a config with the shapes of the weights, by our names.

    text, vision: objects that the configs of LLM and tower were read from, for error messages.
    Raises LayoutError with the field, its value, and the size of the weights. A part without weights is only compared
    if it would be enormous; loading lists missing weights.
    """
    stored = {name: StoredShape(ref.name, ref.file.path.name, ref.shape) for name, ref in refs.items()}
    for name, weight in int4.items():
        codes = weight.parts["qweight"]
        stored[f"{name}.weight"] = StoredShape(codes.name, codes.file.path.name, weight.shape)
    parts = ((text, _text_sizes(config.text_config, stored)), (vision, _tower_sizes(config.vision_config, stored)))
    for fields, sizes in parts:
        for key, asked, found, source in sizes:
            if asked != found:
                raise _size_error(fields, key, asked, f"{found:,}, as in {source}")


def _size_error(fields: Fields, key: str, asked: Any, expected: str) -> LayoutError:
    """Return the error for a size; a size that the file omits is the default of its config class."""
    absent = fields.get(key) is None and key in _IN_CONFIGS
    problem = "not in the file, and its default does not match the weights" if absent else "does not match the weights"
    hint = "config and weights are of different models: download the checkpoint again"
    return LayoutError(problem, file=fields.file, field=fields.field(key), value=asked, expected=expected, hint=hint)


_IN_CONFIGS = (
    "num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "mlp_ratio", "image_size", "patch_size",
)  # fmt: skip

Sizes = Iterator[tuple[str, int, int, object]]
"""Config key, its value, the value found in the weights, and where it was found."""


def _text_sizes(llm: Any, stored: Mapping[str, StoredShape]) -> Sizes:
    blocks = {int(match[1]) for name in stored if (match := _LLM_BLOCK.match(name))}
    yield from _depth(llm.num_hidden_layers, blocks)
    block = f"{_LLM}model.layers.{min(blocks, default=0)}."
    if table := stored.get(f"{_LLM}model.embed_tokens.weight"):
        yield "vocab_size", llm.vocab_size, table.shape[0], table
        yield "hidden_size", llm.hidden_size, table.shape[-1], table
    if gate := stored.get(f"{block}mlp.gate_proj.weight"):
        yield "intermediate_size", llm.intermediate_size, gate.shape[0], gate
    heads = llm.num_attention_heads
    width = head_width(llm)
    for field, name, asked in (
        ("num_attention_heads", "q", heads),
        ("num_key_value_heads", "k", getattr(llm, "num_key_value_heads", heads)),
    ):
        weights = [stored.get(f"{_LLM}model.layers.{block}.self_attn.{name}_proj.weight") for block in sorted(blocks)]
        rows = {weight.shape[0] for weight in weights if weight}
        # Blocks that differ from each other are damaged; loading lists them.
        if rows != {asked * width} and (len(rows) == 1 or asked * width > _MAX_UNCHECKED_POSITIONS):
            found = next((weight for weight in weights if weight), None)
            yield field, asked, min(rows, default=0) // max(1, width), found or "the weight files"


def _depth(asked: int, blocks: set[int]) -> Sizes:
    last = max(blocks, default=-1) + 1
    # Loading lists missing blocks by name, unless there are too many to build.
    found = last if last < 2 * len(blocks) else len(blocks)
    if blocks or asked > _MAX_UNCHECKED_LAYERS:
        yield "num_hidden_layers", asked, found, "the weight files"


def _tower_sizes(tower: Any, stored: Mapping[str, StoredShape]) -> Sizes:
    blocks = {int(match[1]) for name in stored if (match := _TOWER_BLOCK.match(name))}
    yield from _depth(tower.num_hidden_layers, blocks)
    names = ("embeddings.patch_embedding.weight", "embeddings.patch_embeddings.projection.weight")
    patches = next((stored[_TOWER + name] for name in names if _TOWER + name in stored), None)
    patch, side = side_of(tower.patch_size), side_of(tower.image_size)
    positions = (side // patch) ** 2
    if patches:
        yield "hidden_size", tower.hidden_size, patches.shape[0], patches
        yield "patch_size", patch, patches.shape[-1], patches
    names = ("embeddings.position_embedding.weight", "embeddings.position_embeddings")
    if table := next((stored[_TOWER + name] for name in names if _TOWER + name in stored), None):
        found = math.isqrt(max(0, table.shape[-2] - has_cls_token(tower)))
        if positions + has_cls_token(tower) != table.shape[-2]:
            yield "image_size", side, found * patch, table
    elif positions > _MAX_UNCHECKED_POSITIONS:
        yield "image_size", side, 0, "the weight files"
    name = next((name for name in stored if _TOWER_BLOCK.match(name) and name.endswith("mlp.fc1.weight")), "")
    if name:
        first = stored[name]
        if getattr(tower, "intermediate_size", None) is not None:
            yield "intermediate_size", tower.intermediate_size, first.shape[0], first
        else:
            yield "mlp_ratio", tower.mlp_ratio, first.shape[0] // max(1, first.shape[-1]), first
