"""GGUF files for llama.cpp: the language model, and beside it the vision part as `mmproj`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vila.export.target import ExportOptions, Guide

if TYPE_CHECKING:
    from vila.export.source import Source

MODEL, MMPROJ = "model-{precision}.gguf", "mmproj-f16.gguf"
PRECISIONS = {
    "f16": "float16 matrices, float32 vectors; also what llama.cpp's own quantizer reads",
    "q8_0": "8 bits and a half for 32 weights",
    "q4_0": "4 bits and a half for 32 weights, symmetric; embeddings and head in q8_0",
    "q4_1": "4 bits and two halves for 32 weights; embeddings and head in q8_0",
}
RUN_WITH = "llama-cpp-python 0.3.36"


@dataclass(frozen=True)
class GgufTarget:
    """`gguf` with both files, or `gguf-text` with the language model alone."""

    name: str
    summary: str
    has_vision: bool
    verified: str
    takes: frozenset[str] = frozenset({"search"})
    holds_llm: bool = True

    @property
    def precisions(self) -> dict[str, str]:
        """Types of the language model's matrices; the vision part is always float16."""
        return PRECISIONS

    def refusals(self, source: Source, options: ExportOptions) -> list[str]:
        """What llama.cpp has no graph, name or tokenizer for."""
        from vila.export.gguf_int4 import int4_refusals
        from vila.export.gguf_llm import llm_refusals
        from vila.export.gguf_mmproj import mmproj_refusals
        from vila.export.gguf_tokenizer import tokenizer_refusals

        reasons = [
            *llm_refusals(source.config.text_config),
            *int4_refusals(source, options.precision),
            *tokenizer_refusals(source.processor.tokenizer),
        ]
        if self.has_vision and (unseen := mmproj_refusals(source.config)):
            reasons += [f"{reason} (the language model alone: --format gguf-text)" for reason in unseen]
        return reasons

    def write(self, source: Source, part: Path, options: ExportOptions) -> None:
        """Write model-PRECISION.gguf and, with a vision part, mmproj-f16.gguf."""
        from gguf import GGUFWriter

        from vila.export.gguf_file import write_gguf
        from vila.export.gguf_llm import ARCHITECTURES, describe_llm, llm_tensors
        from vila.export.gguf_mmproj import describe_mmproj, mmproj_tensors
        from vila.export.gguf_tokenizer import describe_tokenizer, vocabulary_of

        config = source.config
        vocabulary = vocabulary_of(source.processor, config.text_config.vocab_size)

        def describe(writer: GGUFWriter) -> None:
            writer.add_name(source.folder.resolve().name)
            describe_llm(writer, config.text_config, options.precision)
            describe_tokenizer(writer, vocabulary)

        path = part / MODEL.format(precision=options.precision)
        write_gguf(path, ARCHITECTURES[config.text_config.model_type], describe, llm_tensors(source, options.precision))
        if self.has_vision:
            write_gguf(part / MMPROJ, "clip", lambda writer: describe_mmproj(writer, config), mmproj_tensors(source))

    def guide(self, source: Source, options: ExportOptions) -> Guide:
        """How to run it in llama.cpp."""
        model = f"{{out}}/{MODEL.format(precision=options.precision)}"
        eyes = f" --mmproj {{out}}/{MMPROJ}" if self.has_vision else ""
        ask = (
            f'llama-mtmd-cli -m {model}{eyes} --jinja --image photo.jpg -p "What is in the picture?" --temp 0'
            if self.has_vision
            else f'llama-cli -m {model} --jinja -p "What is a visual language model?" --temp 0'
        )
        commands = [("Ask", ask), ("Serve the OpenAI protocol", f"llama-server -m {model}{eyes} --jinja")]
        if options.precision == "f16":
            smaller = f"llama-quantize {model} {{out}}/model-q4_k_m.gguf Q4_K_M"
            commands.append(("Round it further with llama.cpp's own quantizer", smaller))
        return Guide(commands, [f"{RUN_WITH}: loaded and run"], self._defects(source), self._notes(source))

    def _defects(self, source: Source) -> list[str]:
        defects = []
        if source.processor.span_tokenizer.dummy_prefix:
            defects.append(
                "llama.cpp puts a space before text that follows a special token; a later turn, after `</s>`, is cut "
                "into other tokens than in training."
            )
        if not self.has_vision:
            return defects
        if source.config.vision_config.model_type == "clip_vision_model":
            defects.append(
                "Since May 2025 llama.cpp appends CLIP's class token to the patches but counts positions as if it came "
                "first: each patch has its neighbour's position, the first one is lost and the class token reaches "
                "the LLM (github.com/ggml-org/llama.cpp, issue 25814). In llama-cpp-python 0.3.36 the vectors of a "
                "random model had a mean cosine of 0.59 with the right ones. No file can give the first patch back; a "
                "SigLIP tower, which has no class token, is not touched (0.9999)."
            )
        defects.append(
            "It runs one block of the tower too few unless told otherwise (issue 25817): `clip.vision.feature_layer` "
            "in the mmproj file tells it (without it 0.3.36 gave a cosine of 0.89, with it 0.9999)."
        )
        if source.config.projector_type != "mlp2x_gelu":
            defects.append(
                "It puts a GELU after the first projector matrix even where there is no second: the projector is "
                "written as [W; -W] and [I, -I], for gelu(x) - gelu(-x) = x."
            )
        return defects

    def _notes(self, source: Source) -> list[str]:
        from vila.export.gguf_llm import context_length
        from vila.export.gguf_mmproj import preprocessing_notes

        config = source.config.text_config
        notes = preprocessing_notes(source.config) if self.has_vision else []
        if context_length(config) < config.max_position_embeddings:
            notes.append(f"The context ends at {context_length(config)}, the sliding window, which llama.cpp lacks.")
        return notes


TARGET = GgufTarget(
    "gguf",
    "GGUF files for llama.cpp: the language model, and the tower and projector as mmproj",
    has_vision=True,
    verified=(
        "read back by an independent reader, bit by bit; loaded by llama-cpp-python, F16 with the engine's own greedy "
        "tokens; a CLIP and a SigLIP model run a picture there"
    ),
)
TEXT_TARGET = GgufTarget(
    "gguf-text",
    "The language model alone as a GGUF file for llama.cpp",
    has_vision=False,
    verified="read back by an independent reader, bit by bit; loaded by llama-cpp-python, F16 with our greedy tokens",
)
