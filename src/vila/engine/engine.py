"""The engine: conversations in, text or log-probabilities out."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vila.chat.content import messages_of
from vila.chat.tokenize import IGNORE
from vila.core.errors import ContextOverflowError, DataError
from vila.core.progress import SILENT, Events
from vila.core.types import Image, Message
from vila.core.vision_spec import ImageMode
from vila.engine.answer import Answer
from vila.engine.backend import Backend, check_backend, choose_captured, choose_lean, choose_program
from vila.engine.batch import BatchRun, Run
from vila.engine.columns import check_attention
from vila.engine.context import fit_prompt
from vila.engine.decode import decode
from vila.engine.detokenize import detokenizer_of
from vila.engine.lean_decoder import LeanDecoder
from vila.engine.pictures import PictureFeatures, Prompt, prompt_of
from vila.engine.prefix import DEFAULT_BYTES, Prefixes
from vila.engine.request import Generation, Sampling, TokenEvent, choose_sampling
from vila.engine.slot_run import SlotRun, TorchSlotRun, default_tokens, kept_dtype
from vila.engine.static_run import StaticRun
from vila.engine.static_step import StaticSteps
from vila.families import find_family
from vila.model.loading import choose_dtype, load_model
from vila.model.modeling import VilaForConditionalGeneration
from vila.model.processor import VilaProcessor

if TYPE_CHECKING:
    from vila.engine.onnx.program import OnnxProgram
    from vila.engine.onnx.weights import ActivationBits, HeadBits

Conversation = Sequence[Message | Mapping[str, Any]]
"""Messages of ours, or of the Hugging Face form: role and content, a string or a list of parts."""


@dataclass(frozen=True, slots=True)
class _Job:
    prompt: Prompt
    answer: Answer
    dropped: int


class Engine:
    """Generates and scores text with one model.

    Every method takes `template`, to use another one than the model's own, and those that generate take a Sampling
    or its fields by name: `generate(messages, max_new_tokens=32, temperature=0.2)`. They raise before any work:
    ConfigError for impossible settings, DataError for what is no message, TemplateError for a conversation that does
    not fit the template, ContextOverflowError for one that does not fit the model's context.
    """

    def __init__(
        self,
        model: VilaForConditionalGeneration,
        processor: VilaProcessor,
        program: OnnxProgram | None = None,
        *,
        kept_bytes: int = 0,
        captured: bool = False,
        lean: LeanDecoder | None = None,
    ) -> None:
        """program:    computes what the LLM computes, by onnxruntime; None leaves it to torch.
        kept_bytes: memory for keys and values of the conversations asked alone, which later ones that begin alike go
                    on from. With any, the weights must not change.
        captured:   take torch's steps at fixed addresses, on CUDA as one captured graph; the weights must not move.
        lean:       takes torch's steps on a CPU.
        """
        check_attention(model.config.text_config)
        self.model, self.processor = model.eval(), processor
        self.prefixes = Prefixes(kept_bytes) if kept_bytes else None
        self._program, self._lean = program, lean
        self._steps = StaticSteps(model) if captured else None
        self._detokenizer = detokenizer_of(processor.tokenizer)
        self._stop_ids = _stop_ids(model, processor)
        self._features = PictureFeatures(self._encode)

    @staticmethod
    def load(
        path: str | Path,
        dtype: str = "auto",
        device: str = "cpu",
        *,
        backend: Backend = "auto",
        head_bits: HeadBits | Literal[0] = 0,
        activation_bits: ActivationBits | Literal[0] = 0,
        threads: int = 0,
        kept_bytes: int = DEFAULT_BYTES,
        events: Events = SILENT,
        **loading: Any,
    ) -> Engine:
        """The engine of a checkpoint. dtype: `auto` is bfloat16 where the hardware computes it.

        backend:    `onnx` computes the LLM by onnxruntime, on a CPU alone: float32 where weights are not 4-bit.
                    `auto` takes it for 4-bit models, where it is installed.
        head_bits:  of the onnx backend; 8 and 4 round the head, which is faster and less exact. 0 is 8 for a 4-bit
                    model, else 32.
        activation_bits: of the onnx backend with 4-bit weights: 8 rounds to int8, 16 to two of them, 32 to float32;
                    0 is 8.
        threads:    of the onnx backend; 0 for as many as torch uses.
        kept_bytes: see the constructor.
        events:     is told which backend was chosen.
        loading:    further arguments of `load_model`.

        Raises ConfigError when onnxruntime is missing, or cannot compute this model or run on this device.
        """
        check_backend(backend, head_bits, threads, str(device), activation_bits)
        kind = choose_dtype(dtype, device) if dtype == "auto" else dtype
        model, processor = load_model(path, dtype=kind, device=device, **loading)
        bits = {"head_bits": head_bits, "activation_bits": activation_bits}
        return Engine.on_backend(
            model, processor, backend, **bits, threads=threads, kept_bytes=kept_bytes, events=events
        )

    @staticmethod
    def on_backend(
        model: VilaForConditionalGeneration,
        processor: VilaProcessor,
        backend: str = "auto",
        *,
        kept_bytes: int = DEFAULT_BYTES,
        events: Events = SILENT,
        **options: Any,
    ) -> Engine:
        """The engine of a model that is there already, computed by the fastest that a backend has for it.

        options: of `choose_program`, which says what is refused.
        """
        program = choose_program(model, backend, **options, events=events)
        captured = program is None and choose_captured(model, events)
        lean = choose_lean(model) if program is None else None
        return Engine(model, processor, program, kept_bytes=kept_bytes, captured=captured, lean=lean)

    @property
    def backend(self) -> str:
        """What computes the LLM: `torch`, or `onnx` with the bits of its head, and of activations where not int8."""
        if self._program is None:
            return "torch"
        activations = self._program.activation_bits
        rounded = "" if activations == 8 else f", activations of {activations} bits"
        return f"onnx, head of {self._program.head_bits} bits{rounded}"

    def with_vision(self, *, image_mode: ImageMode | None = None, exif_orientation: bool | None = None) -> Engine:
        """An engine on the same weights with other vision settings; see `VilaProcessor.with_vision`.

        It shares no features and prefixes with this one, but the program and the buffers of its steps: use one of the
        two at a time.
        """
        processor = self.processor.with_vision(image_mode=image_mode, exif_orientation=exif_orientation)
        if processor is self.processor:
            return self
        other = copy.copy(self)
        other.processor = processor
        other.prefixes = Prefixes(self.prefixes.budget) if self.prefixes else None
        other._features = PictureFeatures(other._encode)
        return other

    def generate(
        self, messages: Conversation, sampling: Sampling | None = None, *, template: str = "", **options: Any
    ) -> str:
        """The answer to a conversation. It may hold any turns that the template can express, see `chat.render`."""
        return self.complete([messages], sampling, template=template, **options)[0].text

    def generate_batch(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling | None = None,
        *,
        template: str = "",
        **options: Any,
    ) -> list[str]:
        """The answers to conversations that end with the user's turn, run as one batch."""
        return [answer.text for answer in self.complete(conversations, sampling, template=template, **options)]

    def complete(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling | None = None,
        *,
        template: str = "",
        **options: Any,
    ) -> list[Generation]:
        """Answers with their tokens and how they ended, run as one batch.

        Conversations about the same pictures share the computation of their common prefix.
        """
        chosen = choose_sampling(sampling, options)
        jobs = [self._job(messages, chosen, template) for messages in conversations]
        if jobs:
            for _ in self._decode(jobs, chosen):
                pass
        return [job.answer.generation(len(job.prompt.ids), job.dropped) for job in jobs]

    def stream(
        self, messages: Conversation, sampling: Sampling | None = None, *, template: str = "", **options: Any
    ) -> Iterator[TokenEvent]:
        """The answer piece by piece; the pieces joined and stripped are the text that `generate` gives.

        A character whose bytes are not complete yet, and what may become a stop string, wait for the next token.
        """
        chosen = choose_sampling(sampling, options)
        return self._events(self._job(messages, chosen, template), chosen)

    def _events(self, job: _Job, sampling: Sampling) -> Iterator[TokenEvent]:
        answer = job.answer
        shown = 0
        for _ in self._decode([job], sampling):
            text = answer.certain_text
            if answer.finish is None and len(text) > shown:
                yield TokenEvent(text[shown:])
                shown = len(text)
        yield TokenEvent(answer.text[shown:], answer.finish or "length")

    @torch.inference_mode()
    def score(self, conversations: Sequence[Conversation], *, template: str = "") -> list[list[float]]:
        """Log-probabilities of the supervised tokens (answers and their ends) of whole conversations, one list each."""
        if not conversations:
            return []
        gap = self.processor.find_template(template).media_gap
        rows = [
            self.processor.tokens(
                self.processor.expand_videos(messages_of(messages), gap, shrink=self.processor.spec),
                template,
                prompt=False,
            )
            for messages in conversations
        ]
        longest = max(len(row.ids) for row in rows)
        if longest > self._context:
            raise ContextOverflowError(
                f"a conversation to score has {longest} tokens, but the model's context holds {self._context}"
            )
        places = [[place for place, label in enumerate(row.labels) if place and label != IGNORE] for row in rows]
        before = [[place - 1 for place in wanted] for wanted in places]
        out = []
        logits_of_rows = self._new_run(longest).logits_at([prompt_of(row) for row in rows], before)
        for row, wanted, logits_NV in zip(rows, places, logits_of_rows, strict=True):
            logprobs_NV = logits_NV.log_softmax(-1)
            out.append(logprobs_NV[range(len(wanted)), [row.labels[place] for place in wanted]].tolist())
        return out

    def _decode(self, jobs: Sequence[_Job], sampling: Sampling) -> Iterator[None]:
        return decode(self._new_run, [j.prompt for j in jobs], [j.answer for j in jobs], sampling)

    def _new_run(self, capacity: int) -> Run:
        if self._program is None:
            run = BatchRun(self.model, self._features, capacity, self._lean, self.prefixes)
            return run if self._steps is None else StaticRun(run, self._steps)
        from vila.engine.onnx.run import OnnxRun

        return OnnxRun(self.model, self._features, self._program, capacity, self.prefixes)

    def _slot_run(self, rows: int, tokens: int) -> SlotRun:
        """What a batch runs on that requests join and leave; tokens: of its memory, 0 for the default."""
        dtype = kept_dtype(self.model) if self._program is None else torch.float32
        tokens = tokens or default_tokens(self.model, rows, dtype)
        if self._program is None:
            return TorchSlotRun(self.model, self._features, tokens, self._lean)
        from vila.engine.onnx.slots import OnnxSlotRun

        return OnnxSlotRun(self.model, self._features, tokens, self._program)

    def _job(self, messages: Conversation, sampling: Sampling, template: str) -> _Job:
        # Videos are decoded once, however many turns are left out.
        gap = self.processor.find_template(template).media_gap
        tokens, dropped = fit_prompt(
            self.processor.expand_videos(messages_of(messages), gap, shrink=self.processor.spec),
            lambda some: self.processor.prompt(some, template),
            context=self._context,
            answer=sampling.max_new_tokens,
            overlong=sampling.overlong,
        )
        if not tokens.ids:
            raise DataError("the prompt has no token: neither text nor a picture, and a template without a beginning")
        return _Job(prompt_of(tokens), self._answer(template, sampling.stop), dropped)

    def _answer(self, template: str, stop: Sequence[str] = ()) -> Answer:
        special = self.processor.span_tokenizer.special_ids
        stops = (*self.processor.find_template(template).stop, *stop)
        ids = self._stop_ids | {special[text] for text in stops if text in special}
        return Answer(self._detokenizer, ids, tuple(text for text in stops if text not in special))

    @property
    def _context(self) -> int:
        return self.model.config.context_length

    def _encode(self, images: Sequence[Image]) -> Tensor:
        """Tower features [N, P, C]."""
        return self.model.vision_features(self.processor.pixels(images).to(self.model.device))


def _stop_ids(model: VilaForConditionalGeneration, processor: VilaProcessor) -> frozenset[int]:
    """The tokenizer's end of sequence, and the family's stop tokens that the tokenizer holds as special ones."""
    span = processor.span_tokenizer
    ids = {span.eos_id} if span.eos_id is not None else set()
    family = find_family(model.config.text_config.model_type)
    ids |= {span.special_ids[token] for token in family.stop_tokens if token in span.special_ids}
    return frozenset(ids)
