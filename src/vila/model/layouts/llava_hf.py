"""transformers' own LLaVA directory, which stock transformers, vLLM, SGLang and llama.cpp's converter read.

Three things make it exact. A `linear` projector becomes two layers with no activation between, the second the identity.
`<image>` needs an id below the vocabulary's size, so rows are appended to the embeddings and the head where there is
none; the mean row, which can never be the likeliest. And stock tokenisation leaves out the lone `▁` that the original
puts at the start of the text after a picture, so the chat template writes a space there.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AddedToken, AutoConfig

from vila.core.errors import LayoutError
from vila.core.files import atomic_path, write_json
from vila.core.reading import read_json
from vila.model.layouts.llava_hf_files import (
    CLASSIC,
    IMAGE,
    PREFIXED_TOWERS,
    VOCABULARY,
    config_facts,
    their_prefixes,
    write_generation,
    write_processor,
)
from vila.model.layouts.names import Prefixes, claim, keep_rows, to_theirs
from vila.model.layouts.protocol import Checkpoint
from vila.model.layouts.published import (
    compose,
    generation_facts,
    read_config,
    read_tokenizer,
    template_of,
    text_config,
)
from vila.model.layouts.storage import FULL, Storage
from vila.model.layouts.towers import tower_facts
from vila.model.weights import Piece, find_files, pieces_of

# As the modules are called since transformers 4.52.
_NEW: Prefixes = (
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.vision_model.", "vision_tower."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.linear_1.", "projector.0."),
    ("model.multi_modal_projector.linear_2.", "projector.2."),
)
_TOWERS = (*PREFIXED_TOWERS, "dinov2")


class LlavaHfLayout:
    """config.json with `model_type: llava` and a `text_config`."""

    name = "llava-hf"

    def recognises(self, folder: Path) -> bool:
        """Whether config.json is transformers' LlavaConfig."""
        config = read_config(folder)
        return config.get("model_type") == "llava" and "text_config" in config

    def open(self, folder: Path, base: Path | None = None) -> Checkpoint:
        """Understand the directory. Raises LayoutError for what only some LLaVA variants have."""
        facts = read_config(folder)
        # Only what differs from the defaults of the classes is written in old configs.
        config = AutoConfig.for_model("llava", **{k: v for k, v in facts.items() if k != "model_type"})
        ours = facts.get("vila") or {}
        _refuse(folder, config)
        pieces, unclaimed = claim(pieces_of(find_files(folder)), (*CLASSIC, *_NEW))
        projector = _projector(folder, config, pieces)
        llm = text_config(config.text_config.model_type, config.text_config.to_dict(), folder)
        tokenizer = read_tokenizer(folder)
        placeholder = config.image_token_index
        if rows := ours.get("vocab_size"):
            llm.vocab_size = rows
            placeholder = None
            pieces.update({name: keep_rows(pieces[name], rows) for name in VOCABULARY if name in pieces})
            _remove_image_token(tokenizer)
        image_facts = _image_facts(folder)
        vila_config, processor = compose(
            llm=llm,
            tower=tower_facts(config.vision_config, image_facts, _picture_side(image_facts)),
            tokenizer=tokenizer,
            projector=projector,
            select_layer=config.vision_feature_layer,
            select_feature="patch" if config.vision_feature_select_strategy == "default" else "cls_patch",
            image_mode=ours.get("image_mode") or ("pad" if image_facts.get("do_pad") else "square"),
            template=ours.get("template") or template_of(folder),
            image_token_id=placeholder,
            num_video_frames=ours.get("num_video_frames", 8),
            exif_orientation=ours.get("exif_orientation") is not False,
            vision_source=ours.get("vision_source", ""),
        )
        return Checkpoint(folder, vila_config, processor, pieces, unclaimed, _generation(folder))

    def check(self, model: Any, processor: Any) -> None:
        """Raise LayoutError as `refuse_to_write`, and for a model in 4 bits."""
        refuse_to_write(model.config, processor)
        FULL.check(model)

    def write(self, model: Any, processor: Any, folder: Path) -> None:
        """Write model, processor, tokenizer with `<image>`, chat template and generation config."""
        write_llava(model, processor, folder, FULL)


def _picture_side(image_facts: Mapping[str, Any]) -> int | None:
    """Side of the pictures that the processor makes: a tower may read others than its config's, as DINOv2 does."""
    for key, side in (("crop_size", "height"), ("size", "height"), ("size", "shortest_edge")):
        given = image_facts.get(key)
        if isinstance(given, int) or (isinstance(given, Mapping) and side in given):
            return int(given if isinstance(given, int) else given[side])
    return None


def write_llava(model: Any, processor: Any, folder: Path, storage: Storage) -> None:
    """Write everything that stock code reads, the weights in `storage`. Raises LayoutError as `refuse_to_write`."""
    refuse_to_write(model.config, processor)
    config = storage.config(model)
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    rows = max(config.text_config.vocab_size, image_id + 1)
    weights = storage.stored(_weights(storage.state(model), config, rows))
    facts = config_facts(config, processor, image_id, rows)
    if storage.facts:
        facts["quantization_config"] = dict(storage.facts)
    with atomic_path(folder) as part:
        part.mkdir()
        storage.save(weights, part)
        write_json(part / "config.json", facts, indent=2)
        write_processor(processor, tokenizer, config, part)
        write_generation(model, processor, image_id, part)


def _refuse(folder: Path, config: Any) -> None:
    if not isinstance(config.vision_feature_layer, int):
        raise LayoutError(f"{folder}: features of several layers ({config.vision_feature_layer}) are not supported")
    if not config.multimodal_projector_bias:
        raise LayoutError(f"{folder}: a projector without biases is not supported")


def _projector(folder: Path, config: Any, pieces: dict[str, Piece]) -> str:
    """The projector's type. A linear one written by us loses its second layer, after a look that it does nothing."""
    if config.projector_hidden_act == "gelu":
        return "mlp2x_gelu"
    if config.projector_hidden_act != "linear":
        raise LayoutError(f"{folder}: projector_hidden_act {config.projector_hidden_act!r} is neither gelu nor linear")
    second = {leaf: pieces.pop(f"projector.2.{leaf}", None) for leaf in ("weight", "bias")}
    for leaf, piece in second.items():
        if piece is None:
            raise LayoutError(f"{folder}: multi_modal_projector.linear_2.{leaf} is missing")
        with piece.file.mapped() as get:
            tensor = get(piece.name)
            expected = torch.eye(tensor.shape[0]) if leaf == "weight" else torch.zeros(tensor.shape[0])
            if not torch.equal(tensor.float(), expected):
                raise LayoutError(f"{folder}: two linear projector layers without an activation are not supported")
    for leaf in ("weight", "bias"):
        pieces[f"projector.{leaf}"] = pieces.pop(f"projector.0.{leaf}")
    return "linear"


def _image_facts(folder: Path) -> dict[str, Any]:
    for name, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", "")):
        if (folder / name).is_file():
            facts = read_json(folder / name)
            facts = facts.get(key) if key else facts
            if facts:
                return dict(facts)
    return {}


def _generation(folder: Path) -> dict[str, Any]:
    # Suppressed was the id of <image>, which our model does not have.
    return {key: value for key, value in generation_facts(folder).items() if key != "suppress_tokens"}


def _remove_image_token(tokenizer: Any) -> None:
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != IMAGE]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(spec))


def refuse_to_write(config: Any, processor: Any) -> None:
    """Raises LayoutError for what stock LLaVA cannot express."""
    kind = config.vision_config.model_type
    if config.s2_scales or config.projector_type not in ("linear", "mlp2x_gelu"):
        what = "S2 features" if config.s2_scales else f"the projector {config.projector_type}"
        raise LayoutError(
            f"{what} cannot be written as llava-hf: stock LLaVA has two Linear layers behind one tower; "
            "use vila-v15 or native"
        )
    if kind not in _TOWERS:
        raise LayoutError(f"a {kind} tower cannot be written as llava-hf; towers tried there are {', '.join(_TOWERS)}")
    if config.select_layer == -1 and kind != "clip_vision_model":
        raise LayoutError(
            f"the last hidden state of {kind} cannot be written as llava-hf: stock transformers may normalise it"
        )
    if processor.spec.image_mode == "resize" and kind == "clip_vision_model":
        raise LayoutError(
            "image mode 'resize' of a CLIP tower cannot be written as llava-hf: its processor crops or pads"
        )


def _weights(state: dict[str, Any], config: Any, rows: int) -> dict[str, Any]:
    """Weights by LLaVA's classic names, with `rows` rows of embeddings and head."""
    for name in VOCABULARY:
        if name in state and rows > state[name].shape[0]:
            # Of the numbers as they are stored, so that a model that is written again gets the same row.
            mean = state[name].to(config.dtype).float().mean(0, keepdim=True).to(state[name].dtype)
            state[name] = torch.cat([state[name], mean.expand(rows - state[name].shape[0], -1)])
    if config.projector_type == "linear":
        for leaf in ("weight", "bias"):
            state[f"projector.0.{leaf}"] = state.pop(f"projector.{leaf}")
        first = state["projector.0.weight"]
        state["projector.2.weight"] = torch.eye(first.shape[0], dtype=first.dtype)
        state["projector.2.bias"] = torch.zeros_like(state["projector.0.bias"])
    prefixes = their_prefixes(config)
    return {to_theirs(name, prefixes): tensor for name, tensor in state.items()}


LAYOUT = LlavaHfLayout()
