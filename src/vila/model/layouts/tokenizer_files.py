"""Read and write the tokenizer files of a checkpoint; errors name the damaged file.

Code in a checkpoint (`auto_map`) is never executed.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vila.chat.templates import find_template
from vila.core.errors import LayoutError
from vila.core.reading import Fields, file_errors, foreign_content, read_head, read_json_object, read_text

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_CONFIG, _MODEL, _FAST = "tokenizer_config.json", "tokenizer.model", "tokenizer.json"
_SPECIALS_MAP = "special_tokens_map.json"
_OBJECTS: Final = (_CONFIG, _SPECIALS_MAP, "added_tokens.json", "vocab.json", "chat_template.json")
_TEXTS: Final = ("merges.txt", "chat_template.jinja")
_SPECIALS: Final = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def read_tokenizer(folder: Path, config: PretrainedConfig | None = None) -> Any:
    """Load the tokenizer of a directory; published ones may contain only `tokenizer.model`.

    config: the model's config, by which transformers selects the class; None is a LLaMA.
    LLaMA's is read as in the released code: BOS unless the config disables it, `legacy=False`, padding with `<unk>`.
    Raises LayoutError with the file that is missing, damaged, or inconsistent with the others.
    """
    fields = _read_settings(folder)
    try:
        with file_errors(_main_file(folder), LayoutError):
            tokenizer = _load(folder, fields, config)
            _probe(tokenizer, fields)
    except LayoutError:
        # transformers does not name the file that failed; report a file that cannot be parsed by itself instead.
        _check_files(folder)
        raise
    if config is None and tokenizer.pad_token is None and tokenizer.unk_token is not None:
        tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def _load(folder: Path, fields: Fields, config: PretrainedConfig | None) -> Any:
    from transformers import AutoConfig, AutoTokenizer, LlamaTokenizer

    plain_llama = fields.text("tokenizer_class", "Llama").startswith("Llama")
    if config is None and plain_llama and (folder / _MODEL).is_file():
        return LlamaTokenizer.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            legacy=False,
            add_bos_token=fields.flag("add_bos_token", True),
        )
    # Without a config AutoTokenizer reads config.json, and fails on model types that transformers does not know.
    model_config = AutoConfig.for_model("llama") if config is None else config
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, config=model_config)


def _probe(tokenizer: Any, fields: Fields) -> None:
    """Exercise the tokenizer, so that settings of a wrong type fail here."""
    from vila.chat.tokenize import ids_before_text

    tokenizer.decode(ids_before_text(tokenizer))
    for name in _SPECIALS:
        if getattr(tokenizer, name, None) is not None and getattr(tokenizer, f"{name}_id", None) is None:
            raise fields.refusal(name, "not in the vocabulary")


def _read_settings(folder: Path) -> Fields:
    """Read tokenizer_config.json and check the values that are used; check the first bytes of every other file."""
    for name in (*_OBJECTS, *_TEXTS, _MODEL, _FAST):
        path = folder / name
        if path.is_file() and (known := foreign_content(read_head(path))):
            raise LayoutError(known[0], file=path, hint=known[1])
    path = folder / _CONFIG
    fields = Fields.of_file(path, LayoutError) if path.is_file() else Fields({}, path, error=LayoutError)
    fields.text("tokenizer_class", None)
    fields.flag("add_bos_token", None)
    fields.flag("add_eos_token", None)
    fields.number("model_max_length", None, minimum=1, maximum=1e31)
    fields.text("padding_side", None, choices=("left", "right"))
    fields.section("added_tokens_decoder")
    _check_specials(fields)
    if (folder / _SPECIALS_MAP).is_file():
        _check_specials(Fields.of_file(folder / _SPECIALS_MAP, LayoutError))
    return fields


def _check_specials(fields: Fields) -> None:
    for name in _SPECIALS:
        value = fields.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(content, str):
            raise fields.refusal(name, expected="text, or an object with `content`")


def _main_file(folder: Path) -> Path:
    found = [folder / name for name in (_FAST, _MODEL, "vocab.json") if (folder / name).is_file()]
    if not found:
        raise LayoutError("no tokenizer", file=folder, expected=f"{_FAST} or {_MODEL}")
    return found[0]


def _check_files(folder: Path) -> None:
    """Raise LayoutError naming the first tokenizer file that cannot be parsed by itself."""
    for name in _OBJECTS:
        if (folder / name).is_file():
            read_json_object(folder / name, LayoutError)
    for name in _TEXTS:
        if (folder / name).is_file():
            read_text(folder / name, LayoutError)
    if (folder / _FAST).is_file():
        from tokenizers import Tokenizer

        with file_errors(folder / _FAST, LayoutError):
            Tokenizer.from_file(str(folder / _FAST))
    if (folder / _MODEL).is_file():
        from sentencepiece import SentencePieceProcessor

        with file_errors(folder / _MODEL, LayoutError):
            SentencePieceProcessor(model_file=str(folder / _MODEL))


_PLAIN_CLASSES: Final = (
    "TokenizersBackend",
    "PreTrainedTokenizerFast",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "GPT2Tokenizer",
    "Qwen2Tokenizer",
)
_PLAIN_SETTINGS: Final = frozenset((
    "tokenizer_class", "add_bos_token", "add_eos_token", "add_prefix_space", "model_max_length", "padding_side",
    "added_tokens_decoder", "clean_up_tokenization_spaces", "chat_template", "legacy", "use_default_system_prompt",
    "sp_model_kwargs", "spaces_between_special_tokens", "errors", "split_special_tokens", "backend", "is_local",
    "local_files_only", "processor_class", "model_input_names", "name_or_path", "vocab_size",
    "additional_special_tokens", "extra_special_tokens", "auto_map", *_SPECIALS,
))  # fmt: skip


def is_plain_tokenizer(folder: Path, image_token_id: int | None) -> bool:
    """Return whether a tokenizer and its settings are certainly valid, without transformers.

    image_token_id: placeholder id; None is an id outside of the vocabulary.
    Where the result is False, `read_tokenizer` decides. Raises LayoutError as `read_tokenizer` for files that it reads
    first.
    """
    fields = _read_settings(folder)
    plain_class = fields.text("tokenizer_class", "LlamaTokenizer") in _PLAIN_CLASSES
    if not plain_class or not fields.keys() <= _PLAIN_SETTINGS:
        return False
    specials = dict(fields)
    if (folder / _SPECIALS_MAP).is_file():
        specials |= Fields.of_file(folder / _SPECIALS_MAP, LayoutError)
    for name in _OBJECTS[2:]:
        if (folder / name).is_file():
            read_json_object(folder / name, LayoutError)
    try:
        vocabulary = _read_vocabulary(folder)
    except LayoutError:
        return False
    contents = [specials[name] for name in _SPECIALS if specials.get(name) is not None]
    texts = [content["content"] if isinstance(content, dict) else content for content in contents]
    token = next((token for token, id_ in vocabulary.items() if id_ == image_token_id), "image")
    return bool(vocabulary) and vocabulary.keys() >= set(texts) and "image" in token.lower()


def _read_vocabulary(folder: Path) -> dict[str, int]:
    """Return the ids of all tokens; {} for files that only transformers reads. Raises LayoutError for damaged files."""
    if (folder / _FAST).is_file():
        from tokenizers import Tokenizer

        with file_errors(folder / _FAST, LayoutError):
            return dict(Tokenizer.from_file(str(folder / _FAST)).get_vocab(with_added_tokens=True))
    if not (folder / _MODEL).is_file():
        return {}
    from sentencepiece import SentencePieceProcessor

    with file_errors(folder / _MODEL, LayoutError):
        model = SentencePieceProcessor(model_file=str(folder / _MODEL))
    # The pieces that LLaMA's tokenizers begin with.
    if [model.IdToPiece(id_) for id_ in range(min(3, len(model)))] != ["<unk>", "<s>", "</s>"]:
        return {}
    vocabulary = {model.IdToPiece(id_): id_ for id_ in range(len(model))}
    added = folder / "added_tokens.json"
    return vocabulary | (read_json_object(added, LayoutError) if added.is_file() else {})


def check_placeholder(fields: Fields, key: str, id_: int, tokenizer: Any) -> None:
    """Raise LayoutError if the image placeholder id is a special token such as BOS."""
    token = str(tokenizer.convert_ids_to_tokens(id_)) if id_ in tokenizer.all_special_ids else "<image>"
    if "image" not in token.lower() and "img" not in token.lower():
        own = tokenizer.get_vocab().get("<image>", len(tokenizer))
        expected = f"{own}, or an id outside the vocabulary"
        raise fields.refusal(key, f"{token!r} in the tokenizer", expected=expected)


def write_tokenizer(tokenizer: Any, folder: Path, template: str, *, after_image_space: bool = False) -> None:
    """Write the tokenizer's files, with the conversation template as a Jinja chat template.

    `tokenizer.model` is copied if there is one, for code that reads nothing else.
    """
    from vila.chat.jinja import chat_template

    tokenizer = copy.copy(tokenizer)
    if template:
        tokenizer.chat_template = chat_template(find_template(template), after_image_space=after_image_space)
    tokenizer.save_pretrained(folder)
    source = getattr(tokenizer, "vocab_file", None)
    if source and Path(source).name == "tokenizer.model" and Path(source).is_file():
        shutil.copyfile(source, folder / "tokenizer.model")
