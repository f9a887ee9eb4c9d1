"""Exports `gguf` and `gguf-text`: GGUF files for llama.cpp, the LLM and optionally tower and projector as `mmproj`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from gguf import GGUFWriter

from vila.export.base import ExportOptions, ExportTarget, Readme
from vila.export.gguf_llm import (
    add_llm_metadata,
    add_tokenizer_metadata,
    build_vocabulary,
    context_length,
    llm_problems,
    llm_tensors,
    tokenizer_problems,
)
from vila.export.gguf_mmproj import add_mmproj_metadata, mmproj_problems, mmproj_tensors, preprocessing_notes
from vila.export.gguf_tensors import kept_int4_problems, write_gguf
from vila.export.source import ExportSource

MODEL, MMPROJ = "model-{precision}.gguf", "mmproj-f16.gguf"
PRECISIONS = {
    "f16": "float16 matrices, float32 vectors; also the input of llama-quantize",
    "q8_0": "8 bits, a float16 scale for 32 weights",
    "q4_0": "4 bits, a float16 scale for 32 weights; embeddings and LM head in q8_0",
    "q4_1": "4 bits, a float16 scale and minimum for 32 weights; embeddings and LM head in q8_0",
}
RUN_WITH = "llama-cpp-python 0.3.36"


def _problems(source: ExportSource, options: ExportOptions, *, has_vision: bool) -> list[str]:
    reasons = [
        *llm_problems(source.config.text_config),
        *kept_int4_problems(source, options.precision),
        *tokenizer_problems(source.processor.tokenizer),
    ]
    if has_vision:
        reasons += [f"{reason} (for the LLM alone: --format gguf-text)" for reason in mmproj_problems(source.config)]
    return reasons


def _write(source: ExportSource, part: Path, options: ExportOptions, *, has_vision: bool) -> None:
    config = source.config
    vocabulary = build_vocabulary(source.processor, config.text_config.vocab_size)

    def describe(writer: GGUFWriter) -> None:
        writer.add_name(source.folder.resolve().name)
        add_llm_metadata(writer, config.text_config, options.precision)
        add_tokenizer_metadata(writer, vocabulary)

    path = part / MODEL.format(precision=options.precision)
    write_gguf(path, source.family.gguf, describe, llm_tensors(source, options.precision))
    if has_vision:
        write_gguf(part / MMPROJ, "clip", lambda writer: add_mmproj_metadata(writer, config), mmproj_tensors(source))


def _readme(source: ExportSource, options: ExportOptions, *, has_vision: bool) -> Readme:
    model = f"{{out}}/{MODEL.format(precision=options.precision)}"
    mmproj = f" --mmproj {{out}}/{MMPROJ}" if has_vision else ""
    ask = (
        f'llama-mtmd-cli -m {model}{mmproj} --jinja --image photo.jpg -p "What is in the image?" --temp 0'
        if has_vision
        else f'llama-cli -m {model} --jinja -p "What is a visual language model?" --temp 0'
    )
    commands = [("Run a prompt", ask), ("Serve the OpenAI API", f"llama-server -m {model}{mmproj} --jinja")]
    if options.precision == "f16":
        smaller = f"llama-quantize {model} {{out}}/model-q4_k_m.gguf Q4_K_M"
        commands.append(("Quantize it further with llama.cpp", smaller))
    return Readme(commands, [f"{RUN_WITH}: tested"], _defects(source, has_vision), _notes(source, has_vision))


def _defects(source: ExportSource, has_vision: bool) -> list[str]:
    defects = []
    if source.processor.span_tokenizer.dummy_prefix:
        defects.append(
            "llama.cpp puts a space before text after a special token, so the turns after the first `</s>` are "
            "tokenized differently from training."
        )
    if not has_vision:
        return defects
    if source.config.vision_config.model_type == "clip_vision_model":
        defects.append(
            "CLIP towers are computed wrongly: since May 2025 llama.cpp appends the class token to the patches but "
            "numbers positions as if it came first, so each patch gets its neighbour's position, the first patch "
            "is lost and the class token reaches the LLM (github.com/ggml-org/llama.cpp, issue 25814). In "
            "llama-cpp-python 0.3.36 the image embeddings of a random model had a mean cosine of 0.59 with the "
            "correct ones. The files cannot work around this. SigLIP towers have no class token and are correct "
            "(0.9999)."
        )
    defects.append(
        "llama.cpp runs one block of the tower too few by default (issue 25817); `clip.vision.feature_layer` in "
        "the mmproj file corrects it (0.3.36: cosine 0.89 without, 0.9999 with it)."
    )
    if source.config.projector_type != "mlp2x_gelu":
        defects.append(
            "llama.cpp applies a GELU after the first projector matrix even if there is no second one, so the "
            "projector is written as [W; -W] and [I, -I]: gelu(x) - gelu(-x) = x."
        )
    return defects


def _notes(source: ExportSource, has_vision: bool) -> list[str]:
    config = source.config.text_config
    notes = preprocessing_notes(source.config) if has_vision else []
    if context_length(config) < config.max_position_embeddings:
        notes.append(
            f"Context length {context_length(config)}: llama.cpp lacks sliding window attention for this model."
        )
    return notes


def _target(name: str, summary: str, verification: str, *, has_vision: bool) -> ExportTarget:
    """Return `gguf` with both files, or `gguf-text` with the LLM alone. Tower and projector are always float16."""
    return ExportTarget(
        name,
        summary,
        PRECISIONS,
        verification,
        problems=partial(_problems, has_vision=has_vision),
        write=partial(_write, has_vision=has_vision),
        readme=partial(_readme, has_vision=has_vision),
        options=frozenset({"load_awq"}),
    )


TARGET = _target(
    "gguf",
    "GGUF files for llama.cpp: the LLM, and vision tower and projector as mmproj",
    has_vision=True,
    verification=(
        "bit-exact in an independent reader; run in llama-cpp-python: f16 gives the same greedy tokens as this engine, "
        "and CLIP and SigLIP models run with an image"
    ),
)
TEXT_TARGET = _target(
    "gguf-text",
    "The LLM alone as a GGUF file for llama.cpp",
    has_vision=False,
    verification="bit-exact in an independent reader; run in llama-cpp-python: f16 gives the same greedy tokens",
)
