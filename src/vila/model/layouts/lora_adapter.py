"""LoRA adapters in PEFT's format, merged while the base is loaded: W + (alpha / r) B A (arXiv 2106.09685).

Also supported, with the logits of PEFT within 1e-5: rsLoRA (2312.03732), DoRA (2402.09353), PiSSA (2404.02948), OLoRA
(2406.01775), ranks and alphas per module, biases, embeddings, and modules or rows that are stored completely.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vila.core.errors import DownloadError, LayoutError
from vila.core.files import atomic_path
from vila.core.reading import file_errors
from vila.model.hub import local_folder
from vila.model.layouts.adapter_config import CONFIG_FILE, MERGE_WITH_PEFT, AdapterConfig, read_adapter_config
from vila.model.layouts.base import CheckpointFiles
from vila.model.layouts.config_file import read_config
from vila.model.layouts.detect import open_folder
from vila.model.layouts.native import MODEL_TYPE, read_native_config, read_processor
from vila.model.layouts.tokenizer_files import write_tokenizer
from vila.model.settings import ModelSettings
from vila.model.weights import Shape, TensorRef, list_tensors, open_weight_file, published_names

if TYPE_CHECKING:
    from torch import Tensor

    from vila.model.modeling import VilaForConditionalGeneration
    from vila.model.processor import VilaProcessor

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
_EMPTY: Final = "DeepSpeed ZeRO-3 saves empty weights unless it gathers them; save the adapter again with gathering"
_WRONG_BASE: Final = "is the base the model that the adapter was trained on?"


class TiedHead(NamedTuple):
    """Names of the embeddings and of the LM head that is tied to them."""

    embeddings: str
    head: str


def read_adapter(
    folder: Path, refs: Mapping[str, TensorRef], tied: TiedHead | None
) -> tuple[dict[str, TensorRef], bool]:
    """Return the base's weights with the adapter merged, and whether the LM head is still tied.

    tied: embeddings and LM head of a base that ties them; an adapter that changes one of them unties them.
    Raises LayoutError as `read_adapter_config`, and for adapter weights that are damaged or match nothing.
    """
    config = read_adapter_config(folder)
    path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if path is None:
        raise LayoutError(f"{CONFIG_FILE} without weights", file=folder, expected=" or ".join(_FILES))
    modules, wholes = _read_parts(path)
    out = dict(refs)
    problems = _replace_base_layers(out, wholes, modules, config, tied)
    # PEFT changes embeddings and LM head independently.
    touched = tied and any(name in wholes or name.rpartition(".")[0] in modules for name in tied)
    if tied and touched:
        _check_untied(config, modules, tied)
        out[tied.head] = out[tied.embeddings]
    for name, ref in wholes.items():
        if name in out and out[name].shape == ref.shape:
            out[name] = ref
        else:
            problems.append(
                f"{ref.name} {list(ref.shape)} replaces {name}, which does not exist in the base or differs"
            )
    for module, parts in modules.items():
        problems += _merge(out, module, parts, config)
    if problems:
        more = [f"and {len(problems) - _MAX_PROBLEMS} more"] if len(problems) > _MAX_PROBLEMS else []
        raise LayoutError("; ".join(problems[:_MAX_PROBLEMS] + more), file=path, hint=_WRONG_BASE)
    return out, tied is not None and not touched


def merge_lora(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return `weight` [O, I] + scale x `up` [O, R] x `down` [R, I], computed in float32, in the dtype of `weight`."""
    return (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)


def _read_parts(path: Path) -> tuple[dict[str, dict[str, TensorRef]], dict[str, TensorRef]]:
    """Return the adapter tensors by module and part, and the completely stored weights by name.

    Raises LayoutError for an adapter without weights, for empty or integer weights, and for duplicates.
    """
    modules: dict[str, dict[str, TensorRef]] = {}
    wholes: dict[str, TensorRef] = {}
    adapter = list_tensors([open_weight_file(path)])
    if not adapter:
        raise LayoutError("contains no weights", file=path)
    for name, ref in sorted(adapter.items()):
        if 0 in ref.shape or not ref.dtype.is_floating_point:
            expected, hint = "non-empty floating-point weights", _EMPTY if 0 in ref.shape else None
            raise LayoutError("", file=path, field=name, value=ref.describe(), expected=expected, hint=hint)
        plain = _ADAPTER_NAME.sub(r"\1", name.removeprefix(_PREFIX)).replace(".modules_to_save.", ".")
        module, part = next(
            ((plain[: -len(ending) - 1], part) for ending, part in _PARTS.items() if plain.endswith(f".{ending}")),
            (plain, ""),
        )
        target, key = (modules.setdefault(module, {}), part) if part else (wholes, plain)
        if key in target:
            raise LayoutError(f"duplicate of {target[key].name}", file=path, field=name)
        target[key] = ref
    return modules, wholes


def _replace_base_layers(
    out: dict[str, TensorRef],
    wholes: dict[str, TensorRef],
    modules: Mapping[str, Mapping[str, TensorRef]],
    config: AdapterConfig,
    tied: TiedHead | None,
) -> list[str]:
    """Move base weights that the adapter stores from `wholes` to `out`; return the problems found.

    PEFT stores them when it trains biases (`bias`), with adapters of embeddings, and on request.
    """
    problems = []
    for name, ref in list(wholes.items()):
        plain = name.replace(".base_layer.", ".")
        module, _, leaf = plain.rpartition(".")
        is_vocabulary = module.rpartition(".")[2] in ("embed_tokens", "lm_head")
        allowed = plain != name or is_vocabulary or (config.has_biases and leaf == "bias")
        if config.is_whole(plain) and plain == name:
            continue
        del wholes[name]
        target = tied.embeddings if tied and plain == tied.head else plain
        if not allowed:
            problems.append(f"{ref.name} is neither a LoRA weight nor in modules_to_save")
        elif target not in out or out[target].shape != ref.shape:
            problems.append(
                f"{ref.name} {list(ref.shape)} replaces {target}, which does not exist in the base or differs"
            )
        elif plain == name and leaf == "weight" and module in modules:
            problems.append(f"{ref.name} is stored completely and has an adapter")
        else:
            out[target] = ref
    return problems


def _check_untied(config: AdapterConfig, modules: Mapping[str, Mapping[str, TensorRef]], tied: TiedHead) -> None:
    """Raise LayoutError where PEFT changes tied embeddings and LM head together, which depends on the class."""
    key = "ensure_weight_tying" if config.keeps_tie else "trainable_token_indices" if config.trained_rows else ""
    if key:
        raise LayoutError("LM head and embeddings are tied", file=config.file, field=key, hint=MERGE_WITH_PEFT)
    if config.init and tied.head.rpartition(".")[0] in modules:
        problem = "changes the embeddings, which are tied to the LM head of the adapter"
        raise LayoutError(problem, file=config.file, field="init_lora_weights", value=config.init, hint=MERGE_WITH_PEFT)


def _merge(out: dict[str, TensorRef], module: str, parts: dict[str, TensorRef], config: AdapterConfig) -> list[str]:
    """Merge the adapter of a module into its weights in `out`; return the problems found."""
    first = next(iter(parts.values()))
    weight, bias = f"{module}.weight", f"{module}.bias"
    kinds = parts.keys() - {"bias", "magnitude"}
    if kinds not in ({"down", "up"}, {"embedding_down", "embedding_up"}, {"rows"}):
        return [f"{first.name} has no counterpart"]
    if weight not in out:
        return [f"{first.name} changes {weight}, which does not exist in the base"]
    if "rows" in parts:
        out[weight] = _with_rows(out[weight], parts["rows"], module, config)
        return []
    _check_shapes(out[weight], parts, module, config)
    if ("magnitude" in parts) != config.use_dora:
        problem = f"{module} is {'without' if config.use_dora else 'with'} lora_magnitude_vector"
        raise LayoutError(problem, file=config.file, field="use_dora", value=config.use_dora)
    out[weight] = _with_product(out[weight], parts, module, config)
    if "bias" in parts:
        if bias not in out or out[bias].shape != parts["bias"].shape:
            return [f"{parts['bias'].name} changes {bias}, which does not exist in the base or differs"]
        out[bias] = _with_bias(out[bias], parts["bias"], config.scale_of(module))
    return []


def _check_shapes(base: TensorRef, parts: Mapping[str, TensorRef], module: str, config: AdapterConfig) -> None:
    """Raise LayoutError unless the shapes of an adapter match its base and rank."""
    rank = config.rank_of(module)
    if len(base.shape) != 2:
        raise _shape_error(parts, base, "a base weight with two dimensions")
    rows, columns = base.shape
    expected: dict[str, Shape] = {
        "down": (rank, columns),
        "up": (rows, rank),
        "embedding_down": (rank, rows),
        "embedding_up": (columns, rank),
        "bias": (rows,),
        "magnitude": (columns,) if "embedding_up" in parts else (rows,),
    }
    for part, ref in parts.items():
        if ref.shape != expected[part]:
            raise _shape_error({part: ref}, base, f"{list(expected[part])}, for rank {rank} and {list(base.shape)}")


def _shape_error(parts: Mapping[str, TensorRef], base: TensorRef, expected: str) -> LayoutError:
    ref = next(iter(parts.values()))
    problem = f"does not match the base weight {base.name}"
    hint = f"{_WRONG_BASE} are r and rank_pattern correct in {CONFIG_FILE}?"
    return LayoutError(problem, file=ref.file.path, field=ref.name, value=list(ref.shape), expected=expected, hint=hint)


def _with_product(base: TensorRef, parts: Mapping[str, TensorRef], module: str, config: AdapterConfig) -> TensorRef:
    rank, scale = config.rank_of(module), config.scale_of(module)
    is_embedding = "embedding_up" in parts
    # If the adapter file contains the base weight, PEFT has already subtracted the initial adapter.
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

    return base.then(merge)


def _decomposed(weight: Tensor, down: Tensor, up: Tensor, scale: float, magnitude: Tensor, *, dimension: int) -> Tensor:
    """DoRA: `merge_lora` with the norm of each output (for embeddings: of each channel) set to `magnitude`."""
    import torch

    direction = merge_lora(weight.float(), down, up, scale)
    norm = torch.linalg.norm(direction, dim=dimension, keepdim=True)
    return (direction * (magnitude.float().view(norm.shape) / norm)).to(weight.dtype)


def _without_init(weight: Tensor, rank: int, scale: float, init: str) -> Tensor:
    """Return the weight [O, I] that remains when PEFT subtracts the scaled initial adapter from the base."""
    import torch

    wide = weight.float()
    if init == "pissa":
        left, values, right = torch.linalg.svd(wide, full_matrices=False)
        initial = (left[:, :rank] * values[:rank]) @ right[:rank]
    else:
        left, right = torch.linalg.qr(wide)
        initial = scale * left[:, :rank] @ right[:rank]
    return (wide - initial).to(weight.dtype)


def _with_bias(base: TensorRef, bias: TensorRef, scale: float) -> TensorRef:
    def add(value: Tensor) -> Tensor:
        with _opened({"bias": bias}) as tensors:
            return (value.float() + scale * tensors["bias"].float()).to(value.dtype)

    return base.then(add)


def _with_rows(base: TensorRef, rows: TensorRef, module: str, config: AdapterConfig) -> TensorRef:
    indices = config.rows_of(module)
    if len(base.shape) != 2 or rows.shape != (len(indices), base.shape[1]) or max(indices) >= base.shape[0]:
        raise _shape_error({"rows": rows}, base, f"rows {list(indices)[:8]} of trainable_token_indices")

    def replace_rows(value: Tensor) -> Tensor:
        import torch

        with _opened({"rows": rows}) as tensors:
            return value.index_copy(0, torch.tensor(list(indices)), tensors["rows"].to(value.dtype))

    return base.then(replace_rows)


@contextmanager
def _opened(parts: Mapping[str, TensorRef]) -> Iterator[dict[str, Tensor]]:
    """Yield tensors of one file by the keys of `parts`, without gradients."""
    import torch

    with next(iter(parts.values())).file.open() as get, torch.no_grad():
        yield {part: get(ref.name) for part, ref in parts.items()}


_TIED = TiedHead("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
_BASE = "base_model_name_or_path"
_SIZES = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


class AdapterLayout:
    """adapter_config.json and adapter_model.safetensors, with or without config, processor and tokenizer of the model.

    Without them, as PEFT's own `save_pretrained` writes it, the base's are used.
    """

    name = "adapter"

    def matches(self, folder: Path) -> bool:
        """Return whether there is an adapter and no config.json of another layout."""
        if not (folder / CONFIG_FILE).is_file():
            return False
        return not (folder / "config.json").exists() or read_config(folder).get("model_type") == MODEL_TYPE

    def open(self, folder: Path, base: Path | None = None) -> CheckpointFiles:
        """Open an adapter directory and its base model: `base`, or the one that adapter_config.json names.

        Raises LayoutError if the base model is missing, or is not the model that the adapter was trained on.
        """
        base_folder = base or find_base(folder)
        _check_no_cycle(folder, base_folder)
        base_checkpoint = open_folder(base_folder)
        if base_checkpoint.int4:
            hint = "pass the 16-bit model as base= or --model-base, and quantize the result"
            raise LayoutError("adapters cannot be merged into 4-bit weights", file=base_folder, hint=hint)
        settings, processor, sources = base_checkpoint.settings, base_checkpoint.processor, base_checkpoint.sources
        if (folder / "config.json").is_file():
            settings, sources = read_native_config(folder)
            _check_base(folder, base_folder, settings, base_checkpoint.settings)
        if (folder / "processor_config.json").is_file():
            processor = read_processor(folder, settings)
        tied = _TIED if base_checkpoint.settings.text_config.tie_word_embeddings else None
        refs, still_tied = read_adapter(folder, _by_parameter(base_checkpoint), tied)
        if tied and not still_tied:
            settings = replace(settings, text_config=copy.copy(settings.text_config))
            settings.text_config.tie_word_embeddings = False
        return CheckpointFiles(
            folder, settings, processor, refs, sources, base_checkpoint.unexpected, base_checkpoint.generation
        )


def find_base(folder: Path) -> Path:
    """Return the directory of the base that an adapter names by path or hub id.

    A relative path is resolved from the working directory and from every parent directory of the adapter.
    Raises LayoutError if it is not found.
    """
    adapter = read_adapter_config(folder)
    if not adapter.base:
        raise LayoutError("no base model", file=adapter.file, field=_BASE, hint="pass it as base= or --model-base")
    with file_errors(adapter.file, LayoutError):  # text that is not a valid path
        path = Path(adapter.base).expanduser()
        for candidate in (path, *(parent / path for parent in folder.resolve().parents)):
            if candidate.is_dir() and candidate.resolve() != folder.resolve():
                return candidate
    try:
        return local_folder(adapter.base, adapter.revision)
    except (LayoutError, DownloadError) as error:
        problem = f"no directory below {Path.cwd()} or a parent of the adapter, and not available on the hub ({error})"
        hint = "pass its directory as base= or --model-base"
        raise LayoutError(problem, file=adapter.file, field=_BASE, value=adapter.base, hint=hint) from error


def _check_no_cycle(folder: Path, base: Path) -> None:
    """Raise LayoutError if a chain of adapters and bases leads back to an adapter of the chain."""
    visited = {folder.resolve()}
    while LAYOUT.matches(base):
        if base.resolve() in visited:
            raise LayoutError("circular chain of bases", file=folder / CONFIG_FILE, field=_BASE, value=str(base))
        visited.add(base.resolve())
        base = find_base(base)


def write_adapter(
    model: VilaForConditionalGeneration,
    processor: VilaProcessor,
    tensors: Mapping[str, Tensor],
    folder: Path,
    *,
    base: str,
    whole_modules: list[str],
) -> None:
    """Write an adapter directory atomically, replacing an existing one.

    model:         has adapters injected by PEFT; its config and theirs are written.
    tensors:       adapter weights and completely stored weights, by parameter name.
    base:          path or hub id of the base model, empty if it is not stored anywhere.
    whole_modules: modules that are stored completely, PEFT's `modules_to_save`.
    """
    from safetensors.torch import save_file

    peft_config = copy.copy(model.peft_config["default"])
    peft_config.base_model_name_or_path = base or None
    peft_config.modules_to_save = whole_modules
    peft_config.inference_mode = True
    # AutoPeftModel builds the base from this.
    peft_config.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    named = {_PREFIX + name.replace(".default.", "."): tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_path(folder) as part:
        part.mkdir()
        save_file(named, part / _FILES[0], metadata={"format": "pt"})
        peft_config.save_pretrained(part)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(part)
        processor.save_pretrained(part)
        write_tokenizer(processor.tokenizer, part, processor.template)


def _by_parameter(base: CheckpointFiles) -> dict[str, TensorRef]:
    """Return the base's weights by parameter name, which adapters refer to."""
    from vila.model.modeling import build_on_meta

    names = published_names(build_on_meta(base.load().config))
    return {names.get(name, name): ref for name, ref in base.tensors.items()}


def _check_base(folder: Path, base_folder: Path, adapted: ModelSettings, base: ModelSettings) -> None:
    pairs: dict[str, tuple[Any, Any]] = {}
    for part in ("text_config", "vision_config"):
        mine, its = getattr(adapted, part), getattr(base, part)
        pairs |= {f"{part}.{key}": (getattr(mine, key, None), getattr(its, key, None)) for key in _SIZES}
    for key in ("projector_type", "select_layer", "select_feature"):
        pairs[key] = (getattr(adapted, key), getattr(base, key))
    problems = [f"{key} is {its!r}, the adapter's {mine!r}" for key, (mine, its) in pairs.items() if mine != its]
    if problems:
        problem = f"not the base of {folder}: {'; '.join(problems)}"
        raise LayoutError(problem, file=base_folder, hint="pass the right one as base= or --model-base")


LAYOUT = AdapterLayout()
