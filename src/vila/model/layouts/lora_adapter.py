"""LoRA weights as PEFT writes them, merged while the base loads: W + (alpha / r) B A (arXiv 2106.09685).

Also merged, with the logits of PEFT to 1e-5: rsLoRA (2312.03732), DoRA (2402.09353), PiSSA (2404.02948), OLoRA
(2406.01775), ranks and alphas by module, biases, embeddings, and modules or rows that are stored whole.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor
from transformers.initialization import no_init_weights

from vila.core.errors import DownloadError, LayoutError
from vila.core.files import atomic_path
from vila.core.reading import file_errors
from vila.model.config import VilaConfig
from vila.model.hub import local_folder
from vila.model.layouts.adapter_config import CONFIG_FILE, MERGE_WITH_PEFT, AdapterConfig, read_adapter_config
from vila.model.layouts.base import Checkpoint
from vila.model.layouts.config_file import read_config
from vila.model.layouts.detect import open_folder
from vila.model.layouts.native import read_native_config, read_processor
from vila.model.layouts.tokenizer_files import write_tokenizer
from vila.model.modeling import VilaForConditionalGeneration
from vila.model.processor import VilaProcessor
from vila.model.weights import Shape, TensorRef, Transform, list_tensors, open_weight_file, published_names

# O outputs  I inputs  V vocabulary  D model width  R rank

_PREFIX: Final = "base_model.model."
_FILES: Final = ("adapter_model.safetensors", "adapter_model.bin")
# PEFT names an adapter inside the weight when it holds several: lora_A.default.weight, lora_embedding_A.default.
_ADAPTER_NAME: Final = re.compile(r"(\.lora_\w+|\.token_adapter\.trainable_tokens_delta|\.modules_to_save)\.default\b")
_PARTS: Final = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "bias",
    "lora_embedding_A": "embedding_down",
    "lora_embedding_B": "embedding_up",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "rows",
}
_MAX_PROBLEMS: Final = 8
_EMPTY: Final = "DeepSpeed ZeRO-3 leaves weights empty that it did not gather; save the adapter again, gathered"
_WRONG_BASE: Final = "is the base the model that the adapter was trained on?"


@dataclass(frozen=True)
class TiedHead:
    """Names of the embeddings and of a head that is the same weight."""

    embeddings: str
    head: str


def read_adapter(
    folder: Path, pieces: Mapping[str, TensorRef], tied: TiedHead | None
) -> tuple[dict[str, TensorRef], bool]:
    """Return the base's pieces, changed by the adapter of `folder`, and whether the head is still tied.

    tied: the embeddings and the head of a base that ties them; an adapter that changes one of them unties them.
    Raises LayoutError as `read_adapter_config`, and for adapter weights that are damaged or fit nothing.
    """
    config = read_adapter_config(folder)
    path = _file(folder)
    modules, wholes = _sorted(path)
    out = dict(pieces)
    problems = _replace_base_layers(out, wholes, modules, config, tied)
    touched = tied is not None and _touches(tied, modules, wholes)
    if tied and touched:
        _refuse_tied(config, modules, tied)
        out[tied.head] = out[tied.embeddings]
    for name, piece in wholes.items():
        if name in out and out[name].shape == piece.shape:
            out[name] = piece
        else:
            problems.append(f"{piece.name} {list(piece.shape)} replaces {name}, which the base does not have so")
    for module, parts in modules.items():
        problems += _merge(out, module, parts, config)
    if problems:
        more = [f"and {len(problems) - _MAX_PROBLEMS} more"] if len(problems) > _MAX_PROBLEMS else []
        raise LayoutError("; ".join(problems[:_MAX_PROBLEMS] + more), file=path, hint=_WRONG_BASE)
    return out, tied is not None and not touched


def merge_lora(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """`weight` [O, I] + scale x `up` [O, R] x `down` [R, I], summed in float32, in the dtype of `weight`."""
    return (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)


def _file(folder: Path) -> Path:
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    raise LayoutError(f"{CONFIG_FILE} without weights", file=folder, expected=" or ".join(_FILES))


def _sorted(path: Path) -> tuple[dict[str, dict[str, TensorRef]], dict[str, TensorRef]]:
    """Return the parts of the adapters by their modules, and the weights that are stored whole by their names.

    Raises LayoutError for an adapter without weights, for empty weights and those of integers, and for two of one name.
    """
    modules: dict[str, dict[str, TensorRef]] = {}
    wholes: dict[str, TensorRef] = {}
    adapter = list_tensors([open_weight_file(path)])
    if not adapter:
        raise LayoutError("holds no weights", file=path)
    for name, piece in sorted(adapter.items()):
        if 0 in piece.shape or not piece.dtype.is_floating_point:
            value = f"{str(piece.dtype).removeprefix('torch.')} {list(piece.shape)}"
            hint = _EMPTY if 0 in piece.shape else None
            raise LayoutError(
                "", file=path, field=name, value=value, expected="floating-point weights that are not empty", hint=hint
            )
        plain = _ADAPTER_NAME.sub(r"\1", name.removeprefix(_PREFIX)).replace(".modules_to_save.", ".")
        module, part = next(
            ((plain[: -len(ending) - 1], part) for ending, part in _PARTS.items() if plain.endswith(f".{ending}")),
            (plain, ""),
        )
        place, key = (modules.setdefault(module, {}), part) if part else (wholes, plain)
        if key in place:
            raise LayoutError(f"is there twice, also as {place[key].name}", file=path, field=name)
        place[key] = piece
    return modules, wholes


def _replace_base_layers(
    out: dict[str, TensorRef],
    wholes: dict[str, TensorRef],
    modules: Mapping[str, Mapping[str, TensorRef]],
    config: AdapterConfig,
    tied: TiedHead | None,
) -> list[str]:
    """Put weights of the base that the adapter stores into `out`, take them from `wholes`, return what is wrong.

    PEFT stores them when it trains biases (`bias`), with adapters of embeddings, and when it was told to.
    """
    problems = []
    for name, piece in list(wholes.items()):
        plain = name.replace(".base_layer.", ".")
        module, _, leaf = plain.rpartition(".")
        allowed = plain != name or _is_vocabulary(module) or (config.has_biases and leaf == "bias")
        if config.is_whole(plain) and plain == name:
            continue
        del wholes[name]
        target = tied.embeddings if tied and plain == tied.head else plain
        if not allowed:
            problems.append(f"{piece.name} is no LoRA weight, and no module of modules_to_save")
        elif target not in out or out[target].shape != piece.shape:
            problems.append(f"{piece.name} {list(piece.shape)} replaces {target}, which the base does not have so")
        elif plain == name and leaf == "weight" and module in modules:
            problems.append(f"{piece.name} is stored whole and has an adapter")
        else:
            out[target] = piece
    return problems


def _is_vocabulary(module: str) -> bool:
    return module.rpartition(".")[2] in ("embed_tokens", "lm_head")


def _touches(tied: TiedHead, modules: Mapping[str, object], wholes: Mapping[str, object]) -> bool:
    """Whether an adapter changes the embeddings or the head, which PEFT does with each alone."""
    both = (tied.embeddings, tied.head)
    return any(name in wholes or name.rpartition(".")[0] in modules for name in both)


def _refuse_tied(config: AdapterConfig, modules: Mapping[str, Mapping[str, TensorRef]], tied: TiedHead) -> None:
    """Raise LayoutError where PEFT changes embeddings and head together, or may do so: it depends on the class."""
    key = "ensure_weight_tying" if config.keeps_tie else "trainable_token_indices" if config.trained_rows else ""
    if key:
        raise LayoutError("the base ties its head to its embeddings", file=config.file, field=key, hint=MERGE_WITH_PEFT)
    if config.init and tied.head.rpartition(".")[0] in modules:
        raise LayoutError(
            "changes the embeddings too, which are also the head that the adapter belongs to",
            file=config.file,
            field="init_lora_weights",
            value=config.init,
            hint=MERGE_WITH_PEFT,
        )


def _merge(out: dict[str, TensorRef], module: str, parts: dict[str, TensorRef], config: AdapterConfig) -> list[str]:
    """Merge the adapter of a module into its pieces in `out`; return what is wrong."""
    first = next(iter(parts.values()))
    weight, bias = f"{module}.weight", f"{module}.bias"
    kinds = parts.keys() - {"bias", "magnitude"}
    if kinds not in ({"down", "up"}, {"embedding_down", "embedding_up"}, {"rows"}):
        return [f"{first.name} is there without what belongs to it"]
    if weight not in out:
        return [f"{first.name} changes {weight}, which the base does not have"]
    if "rows" in parts:
        out[weight] = _with_rows(out[weight], parts["rows"], module, config)
        return []
    _check_shapes(out[weight], parts, module, config)
    if ("magnitude" in parts) != config.use_dora:
        raise LayoutError(
            f"{module} is {'without' if config.use_dora else 'with'} lora_magnitude_vector",
            file=config.file,
            field="use_dora",
            value=config.use_dora,
        )
    out[weight] = _with_product(out[weight], parts, module, config)
    if "bias" in parts:
        if bias not in out or out[bias].shape != parts["bias"].shape:
            return [f"{parts['bias'].name} changes {bias}, which the base does not have so"]
        out[bias] = _with_bias(out[bias], parts["bias"], config.scale_of(module))
    return []


def _check_shapes(base: TensorRef, parts: Mapping[str, TensorRef], module: str, config: AdapterConfig) -> None:
    """Raise LayoutError unless the shapes of an adapter are those of its base and of its rank."""
    rank = config.rank_of(module)
    if len(base.shape) != 2:
        raise _misfit(parts, base, "an adapter of a weight with two dimensions")
    rows, columns = base.shape
    expected: dict[str, Shape] = {
        "down": (rank, columns),
        "up": (rows, rank),
        "embedding_down": (rank, rows),
        "embedding_up": (columns, rank),
        "bias": (rows,),
        "magnitude": (columns,) if "embedding_up" in parts else (rows,),
    }
    for part, piece in parts.items():
        if piece.shape != expected[part]:
            raise _misfit({part: piece}, base, f"{list(expected[part])}, for rank {rank} and {list(base.shape)}")


def _misfit(parts: Mapping[str, TensorRef], base: TensorRef, expected: str) -> LayoutError:
    piece = next(iter(parts.values()))
    return LayoutError(
        f"does not fit the base weight {base.name}",
        file=piece.file.path,
        field=piece.name,
        value=list(piece.shape),
        expected=expected,
        hint=f"{_WRONG_BASE} Are r and rank_pattern those of its {CONFIG_FILE}?",
    )


def _with_product(base: TensorRef, parts: Mapping[str, TensorRef], module: str, config: AdapterConfig) -> TensorRef:
    rank, scale = config.rank_of(module), config.scale_of(module)
    is_embedding = "embedding_up" in parts
    # The adapter file stores the base that its initialisation left, where PEFT saved that.
    init = "" if is_embedding or base.file is next(iter(parts.values())).file else config.init

    def merge(weight: Tensor) -> Tensor:
        with _opened(parts) as tensors:
            if is_embedding:
                down, up = tensors["embedding_up"].T, tensors["embedding_down"].T
            else:
                down, up = tensors["down"], tensors["up"]
            rest = _without_init(weight, rank, scale, init) if init else weight
            if "magnitude" not in tensors:
                return merge_lora(rest, down, up, scale)
            return _decomposed(rest, down, up, scale, tensors["magnitude"], dimension=0 if is_embedding else 1)

    return _then(base, merge)


def _decomposed(weight: Tensor, down: Tensor, up: Tensor, scale: float, magnitude: Tensor, *, dimension: int) -> Tensor:
    """`merge_lora` with the norm of each output (of each channel of embeddings) set to `magnitude`, as in DoRA."""
    direction = merge_lora(weight.float(), down, up, scale)
    norm = torch.linalg.norm(direction, dim=dimension, keepdim=True)
    return (direction * (magnitude.float().view(norm.shape) / norm)).to(weight.dtype)


def _without_init(weight: Tensor, rank: int, scale: float, init: str) -> Tensor:
    """Return the weight [O, I] that PEFT leaves when it subtracts the initial adapter, scaled, from the base."""
    wide = weight.float()
    if init == "pissa":
        left, values, right = torch.linalg.svd(wide, full_matrices=False)
        part = (left[:, :rank] * values[:rank]) @ right[:rank]
    else:
        left, right = torch.linalg.qr(wide)
        part = scale * left[:, :rank] @ right[:rank]
    return (wide - part).to(weight.dtype)


def _with_bias(base: TensorRef, bias: TensorRef, scale: float) -> TensorRef:
    def add(value: Tensor) -> Tensor:
        with _opened({"bias": bias}) as tensors:
            return (value.float() + scale * tensors["bias"].float()).to(value.dtype)

    return _then(base, add)


def _with_rows(base: TensorRef, rows: TensorRef, module: str, config: AdapterConfig) -> TensorRef:
    places = config.rows_of(module)
    if len(base.shape) != 2 or rows.shape != (len(places), base.shape[1]) or max(places) >= base.shape[0]:
        raise _misfit({"rows": rows}, base, f"rows {list(places)[:8]} of trainable_token_indices")

    def put(value: Tensor) -> Tensor:
        with _opened({"rows": rows}) as tensors:
            return value.index_copy(0, torch.tensor(list(places)), tensors["rows"].to(value.dtype))

    return _then(base, put)


@contextmanager
def _opened(parts: Mapping[str, TensorRef]) -> Iterator[dict[str, Tensor]]:
    """Tensors of one file by the keys of `parts`, without gradients."""
    with next(iter(parts.values())).file.open() as get, torch.no_grad():
        yield {part: get(piece.name) for part, piece in parts.items()}


def _then(base: TensorRef, change: Transform) -> TensorRef:
    first: Callable[[Tensor], Tensor] | None = base.transform
    return replace(base, transform=change if first is None else lambda tensor: change(first(tensor)))


# --- adapter
# Adapter directories: what PEFT reads, and beside it config, processor and tokenizer of the whole model.


_WEIGHTS = "adapter_model.safetensors"
_TIED = TiedHead("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
_ADAPTER_PREFIX = "base_model.model."
_BASE = "base_model_name_or_path"
_SIZES = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


class AdapterLayout:
    """adapter_config.json and adapter_model.safetensors, with or without config, processor and tokenizer.

    Without them, as PEFT's own `save_pretrained` leaves it, they are the base's.
    """

    name = "adapter"

    def matches(self, folder: Path) -> bool:
        """Whether there is an adapter and no config.json of another layout."""
        if not (folder / CONFIG_FILE).is_file():
            return False
        return not (folder / "config.json").exists() or read_config(folder).get("model_type") == VilaConfig.model_type

    def open(self, folder: Path, base: Path | None = None) -> Checkpoint:
        """Understand the directory and its base: `base`, or the one that adapter_config.json names.

        Raises LayoutError when the base is not there, or is another model than the adapter was trained on.
        """
        home = base or find_base(folder)
        _refuse_circle(folder, home)
        under = open_folder(home)
        if under.int4:
            raise LayoutError(
                f"{home}: its weights are in 4 bits, which no adapter can be merged into; give the 16-bit model that "
                "they were made from as base= or --model-base, and quantize what comes out"
            )
        config, processor, sources = under.config, under.processor, under.sources
        if (folder / "config.json").is_file():
            config, sources = read_native_config(folder)
            _refuse_another_base(folder, home, config, under.config)
        if (folder / "processor_config.json").is_file():
            processor = read_processor(folder, config)
        tied = _TIED if under.config.text_config.tie_word_embeddings else None
        pieces, still_tied = read_adapter(folder, _by_module(under), tied)
        if tied and not still_tied:
            config = copy.deepcopy(config)
            config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
        return Checkpoint(folder, config, processor, pieces, sources, under.unexpected, under.generation)


def find_base(folder: Path) -> Path:
    """The directory of the base that an adapter names, which may be a path or a hub id.

    A relative path starts from here, or from any directory above the adapter.
    Raises LayoutError saying where it was looked for.
    """
    adapter = read_adapter_config(folder)
    if not adapter.base:
        raise LayoutError("names no base", file=adapter.file, field=_BASE, hint="give it as base= or --model-base")
    with file_errors(adapter.file, LayoutError):  # a text that no path can be
        path = Path(adapter.base).expanduser()
        for place in (path, *(above / path for above in folder.resolve().parents)):
            if place.is_dir() and place.resolve() != folder.resolve():
                return place
    try:
        return local_folder(adapter.base, adapter.revision)
    except (LayoutError, DownloadError) as error:
        raise LayoutError(
            f"no directory from {Path.cwd()} or from above the adapter, and not to be had from the hub ({error})",
            file=adapter.file,
            field=_BASE,
            value=adapter.base,
            hint="give the directory where it is now as base= or --model-base",
        ) from error


def _refuse_circle(folder: Path, home: Path) -> None:
    """Raise LayoutError if the base of an adapter, the base of that one, and so on, lead back to an adapter of them."""
    visited = {folder.resolve()}
    while LAYOUT.matches(home):
        if home.resolve() in visited:
            raise LayoutError(
                "adapters that are each other's base", file=folder / CONFIG_FILE, field=_BASE, value=str(home)
            )
        visited.add(home.resolve())
        home = find_base(home)


def write_adapter(
    model: VilaForConditionalGeneration,
    processor: VilaProcessor,
    tensors: Mapping[str, Tensor],
    folder: Path,
    *,
    base: str,
    parts: list[str],
) -> None:
    """Write an adapter directory atomically; an existing one is replaced.

    model:   has adapters that PEFT injected; its config and theirs are written.
    tensors: adapters and whole parts, by the names of the model's parameters.
    base:    path or hub id of the model that the adapters belong to, empty where it lies nowhere.
    parts:   modules whose tensors are whole, PEFT's `modules_to_save`.
    """
    facts = copy.copy(model.peft_config["default"])
    facts.base_model_name_or_path = base or None
    facts.modules_to_save = parts
    facts.inference_mode = True
    # What AutoPeftModel builds the base with.
    facts.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    named = {_ADAPTER_PREFIX + name.replace(".default.", "."): tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_path(folder) as part:
        part.mkdir()
        save_file(named, part / _WEIGHTS, metadata={"format": "pt"})
        facts.save_pretrained(part)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(part)
        processor.save_pretrained(part)
        write_tokenizer(processor.tokenizer, part, processor.template)


def _by_module(base: Checkpoint) -> dict[str, TensorRef]:
    """The base's pieces by the names of modules and their parameters, which adapters go by."""
    with init_empty_weights(include_buffers=False), no_init_weights():
        here = published_names(VilaForConditionalGeneration(base.config))
    return {here.get(name, name): piece for name, piece in base.tensors.items()}


def _refuse_another_base(folder: Path, home: Path, adapted: VilaConfig, base: VilaConfig) -> None:
    pairs: dict[str, tuple[Any, Any]] = {}
    for part in ("text_config", "vision_config"):
        mine, its = getattr(adapted, part), getattr(base, part)
        pairs |= {f"{part}.{key}": (getattr(mine, key, None), getattr(its, key, None)) for key in _SIZES}
    for key in ("projector_type", "select_layer", "select_feature"):
        pairs[key] = (getattr(adapted, key), getattr(base, key))
    problems = [f"{key} is {its!r}, the adapter's {mine!r}" for key, (mine, its) in pairs.items() if mine != its]
    if problems:
        raise LayoutError(
            f"{home}: not the base of {folder}: {'; '.join(problems)}; give the right one as base= or --model-base"
        )


LAYOUT = AdapterLayout()
