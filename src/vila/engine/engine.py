"""The `Engine`: generates, streams and scores text for conversations."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vila.chat.content import parse_messages
from vila.chat.tokenize import IGNORE
from vila.core.errors import ContextOverflowError, DataError
from vila.core.progress import SILENT, Events
from vila.core.types import Image, Message
from vila.core.vision_spec import ImageMode
from vila.engine.answer import Answer
from vila.engine.attention_mask import check_attention
from vila.engine.backend import Backend, check_backend, choose_cuda_graph, choose_fast_decoder, choose_program
from vila.engine.batch import BatchRun, Run
from vila.engine.context import fit_prompt
from vila.engine.cuda_graph_run import CudaGraphRun
from vila.engine.cuda_graph_step import CudaGraphSteps
from vila.engine.decode import decode
from vila.engine.detokenize import detokenizer_of
from vila.engine.fast_decoder import FastDecoder
from vila.engine.model_runner import ModelRunner, TorchRunner, default_tokens, kv_dtype
from vila.engine.prefix_cache import DEFAULT_BYTES, PrefixCache
from vila.engine.request import Generation, SamplingParams, TokenEvent, choose_sampling
from vila.engine.vision_cache import Prompt, VisionCache, build_prompt
from vila.families import find_family
from vila.model.loading import choose_dtype, load_model
from vila.model.modeling import VilaForConditionalGeneration
from vila.model.processor import VilaProcessor

if TYPE_CHECKING:
    from vila.engine.onnx.program import OnnxProgram
    from vila.engine.onnx.weights import ActivationBits, HeadBits

Conversation = Sequence[Message | Mapping[str, Any]]
"""`Message`s, or dicts in the Hugging Face format: role and content, a string or a list of parts."""


@dataclass(frozen=True, slots=True)
class _Job:
    prompt: Prompt
    answer: Answer
    dropped: int


class Engine:
    """Generates and scores text with one model.

    Every method takes `template`, which overrides the model's own template. Generating methods take a SamplingParams or
    its fields as keywords: `generate(messages, max_new_tokens=32, temperature=0.2)`. All of them validate first and
    raise ConfigError (invalid settings), DataError (invalid messages), TemplateError (the template cannot express the
    conversation) or ContextOverflowError (longer than the model's context).
    """

    def __init__(
        self,
        model: VilaForConditionalGeneration,
        processor: VilaProcessor,
        program: OnnxProgram | None = None,
        *,
        prefix_cache_bytes: int = 0,
        cuda_graph: bool = False,
        fast_decoder: FastDecoder | None = None,
    ) -> None:
        """program:            runs the LLM with onnxruntime; None: with torch.
        prefix_cache_bytes: size of the prefix cache, which single conversations read and fill; 0 disables it. If it is
                            enabled, the weights must not change.
        cuda_graph:         run decode steps on static buffers, on CUDA as a CUDA graph; the weights must not move.
        fast_decoder:       runs decode steps on a CPU.
        """
        check_attention(model.config.text_config)
        self.model, self.processor = model.eval(), processor
        self.prefix_cache = PrefixCache(prefix_cache_bytes) if prefix_cache_bytes else None
        self._program, self._fast_decoder = program, fast_decoder
        self._steps = CudaGraphSteps(model) if cuda_graph else None
        self._detokenizer = detokenizer_of(processor.tokenizer)
        self._stop_ids = _stop_ids(model, processor)
        self._features = VisionCache(self._encode)

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
        prefix_cache_bytes: int = DEFAULT_BYTES,
        events: Events = SILENT,
        **loading: Any,
    ) -> Engine:
        """Load a checkpoint and return its engine.

        dtype:           `auto` is bfloat16 if the hardware supports it.
        backend:         `onnx` runs the LLM with onnxruntime (CPU only), in float32 unless the weights are 4-bit.
                         `auto` uses it for 4-bit models if it is installed.
        head_bits:       onnx: bits of the LM head's weights; 8 and 4 are faster and less exact. 0: 8 for a 4-bit model,
                         else 32.
        activation_bits: onnx with 4-bit weights: 8 rounds activations to int8, 16 to two int8 values, 32 keeps float32.
                         0: 8.
        threads:         onnx: number of threads; 0: as many as torch.
        prefix_cache_bytes: see the constructor.
        events:          logs the chosen backend.
        loading:         further arguments of `load_model`.

        Raises ConfigError if onnxruntime is missing, or does not support the model or the device.
        """
        check_backend(backend, head_bits, threads, str(device), activation_bits)
        kind = choose_dtype(dtype, device) if dtype == "auto" else dtype
        model, processor = load_model(path, dtype=kind, device=device, **loading)
        bits = {"head_bits": head_bits, "activation_bits": activation_bits}
        return Engine.on_backend(
            model, processor, backend, **bits, threads=threads, prefix_cache_bytes=prefix_cache_bytes, events=events
        )

    @staticmethod
    def on_backend(
        model: VilaForConditionalGeneration,
        processor: VilaProcessor,
        backend: str = "auto",
        *,
        prefix_cache_bytes: int = DEFAULT_BYTES,
        events: Events = SILENT,
        **options: Any,
    ) -> Engine:
        """Return the engine of a loaded model with the fastest implementation of a backend.

        options: of `choose_program`, which documents the errors.
        """
        program = choose_program(model, backend, **options, events=events)
        cuda_graph = program is None and choose_cuda_graph(model, events)
        fast_decoder = choose_fast_decoder(model) if program is None else None
        return Engine(
            model,
            processor,
            program,
            prefix_cache_bytes=prefix_cache_bytes,
            cuda_graph=cuda_graph,
            fast_decoder=fast_decoder,
        )

    @property
    def backend(self) -> str:
        """`torch`, or `onnx` with the bits of the LM head, and of activations unless they are int8."""
        if self._program is None:
            return "torch"
        activations = self._program.activation_bits
        rounded = "" if activations == 8 else f", {activations}-bit activations"
        return f"onnx, {self._program.head_bits}-bit head{rounded}"

    def with_vision(self, *, image_mode: ImageMode | None = None, exif_orientation: bool | None = None) -> Engine:
        """Return an engine on the same weights with other vision settings; see `VilaProcessor.with_vision`.

        It has its own vision and prefix cache, but shares the buffers of decode steps: use only one of the two at a
        time.
        """
        processor = self.processor.with_vision(image_mode=image_mode, exif_orientation=exif_orientation)
        if processor is self.processor:
            return self
        other = copy.copy(self)
        other.processor = processor
        other.prefix_cache = PrefixCache(self.prefix_cache.budget) if self.prefix_cache else None
        other._features = VisionCache(other._encode)
        return other

    def generate(
        self, messages: Conversation, sampling: SamplingParams | None = None, *, template: str = "", **options: Any
    ) -> str:
        """Return the answer to a conversation, with any turns that the template supports, see `chat.render`."""
        return self.complete([messages], sampling, template=template, **options)[0].text

    def generate_batch(
        self,
        conversations: Sequence[Conversation],
        sampling: SamplingParams | None = None,
        *,
        template: str = "",
        **options: Any,
    ) -> list[str]:
        """Return the answers to conversations that end with a user turn, computed as one batch."""
        return [answer.text for answer in self.complete(conversations, sampling, template=template, **options)]

    def complete(
        self,
        conversations: Sequence[Conversation],
        sampling: SamplingParams | None = None,
        *,
        template: str = "",
        **options: Any,
    ) -> list[Generation]:
        """Return the answers with their tokens and finish reasons, computed as one batch.

        The common prefix of conversations about the same images is computed once.
        """
        chosen = choose_sampling(sampling, options)
        jobs = [self._job(messages, chosen, template) for messages in conversations]
        if jobs:
            for _ in self._decode(jobs, chosen):
                pass
        return [job.answer.generation(len(job.prompt.ids), job.dropped) for job in jobs]

    def stream(
        self, messages: Conversation, sampling: SamplingParams | None = None, *, template: str = "", **options: Any
    ) -> Iterator[TokenEvent]:
        """Yield the answer in pieces, which joined and stripped are the result of `generate`.

        Partial characters and possible beginnings of stop strings are held back until the next token.
        """
        chosen = choose_sampling(sampling, options)
        return self._events(self._job(messages, chosen, template), chosen)

    def _events(self, job: _Job, sampling: SamplingParams) -> Iterator[TokenEvent]:
        answer = job.answer
        shown = 0
        for _ in self._decode([job], sampling):
            text = answer.final_text
            if answer.finish is None and len(text) > shown:
                yield TokenEvent(text[shown:])
                shown = len(text)
        yield TokenEvent(answer.text[shown:], answer.finish or "length")

    @torch.inference_mode()
    def score(self, conversations: Sequence[Conversation], *, template: str = "") -> list[list[float]]:
        """Return the log-probabilities of the supervised tokens (answers and their end tokens) of each conversation."""
        if not conversations:
            return []
        gap = self.processor.find_template(template).media_gap
        rows = [
            self.processor.tokens(
                self.processor.expand_videos(parse_messages(messages), gap, shrink=self.processor.spec),
                template,
                prompt=False,
            )
            for messages in conversations
        ]
        longest = max(len(row.ids) for row in rows)
        if longest > self._context:
            raise ContextOverflowError(
                f"a conversation to score has {longest} tokens, but the context length is {self._context}",
                hint="shorten it",
            )
        places = [[place for place, label in enumerate(row.labels) if place and label != IGNORE] for row in rows]
        before = [[place - 1 for place in wanted] for wanted in places]
        out = []
        logits_of_rows = self._new_run(longest).logits_at([build_prompt(row) for row in rows], before)
        for row, wanted, logits_NV in zip(rows, places, logits_of_rows, strict=True):
            logprobs_NV = logits_NV.log_softmax(-1)
            out.append(logprobs_NV[range(len(wanted)), [row.labels[place] for place in wanted]].tolist())
        return out

    def _decode(self, jobs: Sequence[_Job], sampling: SamplingParams) -> Iterator[None]:
        return decode(self._new_run, [j.prompt for j in jobs], [j.answer for j in jobs], sampling)

    def _new_run(self, capacity: int) -> Run:
        if self._program is None:
            run = BatchRun(self.model, self._features, capacity, self._fast_decoder, self.prefix_cache)
            return run if self._steps is None else CudaGraphRun(run, self._steps)
        from vila.engine.onnx.batch_run import OnnxBatchRun

        return OnnxBatchRun(self.model, self._features, self._program, capacity, self.prefix_cache)

    def _model_runner(self, rows: int, tokens: int) -> ModelRunner:
        """Return the model runner for continuous batching; tokens: KV cache capacity, 0: the default."""
        dtype = kv_dtype(self.model) if self._program is None else torch.float32
        tokens = tokens or default_tokens(self.model, rows, dtype)
        if self._program is None:
            return TorchRunner(self.model, self._features, tokens, self._fast_decoder)
        from vila.engine.onnx.runner import OnnxRunner

        return OnnxRunner(self.model, self._features, tokens, self._program)

    def _job(self, messages: Conversation, sampling: SamplingParams, template: str) -> _Job:
        # Videos are decoded once, however many turns are dropped.
        gap = self.processor.find_template(template).media_gap
        tokens, dropped = fit_prompt(
            self.processor.expand_videos(parse_messages(messages), gap, shrink=self.processor.spec),
            lambda some: self.processor.prompt(some, template),
            context=self._context,
            answer=sampling.max_new_tokens,
            overlong=sampling.overlong,
        )
        if not tokens.ids:
            raise DataError("the prompt has no tokens: no text, no image, and a template without a prefix")
        return _Job(build_prompt(tokens), self._answer(template, sampling.stop), dropped)

    def _answer(self, template: str, stop: Sequence[str] = ()) -> Answer:
        special = self.processor.span_tokenizer.special_ids
        stops = (*self.processor.find_template(template).stop, *stop)
        ids = self._stop_ids | {special[text] for text in stops if text in special}
        return Answer(self._detokenizer, ids, tuple(text for text in stops if text not in special))

    @property
    def _context(self) -> int:
        return self.model.config.context_length

    def _encode(self, images: Sequence[Image]) -> Tensor:
        """Return tower features [N, P, C]."""
        return self.model.vision_features(self.processor.pixels(images).to(self.model.device))


def _stop_ids(model: VilaForConditionalGeneration, processor: VilaProcessor) -> frozenset[int]:
    """Return the ids of the EOS token and of the family's stop tokens that are special tokens of the tokenizer."""
    span = processor.span_tokenizer
    ids = {span.eos_id} if span.eos_id is not None else set()
    family = find_family(model.config.text_config.model_type)
    ids |= {span.special_ids[token] for token in family.stop_tokens if token in span.special_ids}
    return frozenset(ids)
