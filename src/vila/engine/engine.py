"""The `Engine`: generates, streams and scores text for conversations."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from vila.chat.content import parse_messages
from vila.chat.detokenize import detokenizer_of
from vila.chat.fit import fit_prompt
from vila.chat.tokenize import IGNORE, Tokens
from vila.core.errors import CancelledError, ContextOverflowError, DataError
from vila.core.progress import SILENT, Events
from vila.core.types import Message
from vila.core.vision_spec import ImageMode
from vila.engine.attention import check_attention
from vila.engine.backend import (
    Backend,
    check_backend,
    choose_cuda_graph,
    choose_fast_decoder,
    choose_program,
    new_runner,
)
from vila.engine.fast_decoder import FastDecoder
from vila.engine.kv_cache import KVCachePool, content_keys
from vila.engine.prompt_lookup import PromptLookup
from vila.engine.request import Answer, OnEvent, Request, RequestHandle
from vila.engine.sampler import Sampler, text_of
from vila.engine.sampling_params import Generation, SamplingParams, TokenEvent, choose_sampling
from vila.engine.scheduler import Scheduler
from vila.engine.vision_cache import VisionCache, build_prompt
from vila.families import find_family
from vila.model.loading import choose_dtype, load_model
from vila.model.modeling import VilaForConditionalGeneration
from vila.model.processor import VilaProcessor

if TYPE_CHECKING:
    from vila.engine.onnx_weights import ActivationBits, HeadBits
    from vila.engine.runner_onnx import OnnxProgram

Conversation = Sequence[Message | Mapping[str, Any]]
"""`Message`s, or dicts in the Hugging Face format: role and content, a string or a list of parts."""


_MAX_NUM_SEQS = 32
"""Conversations that an engine answers together; further ones of a batch join when others end."""
_PREFILL_CHUNK = 2048
"""Prompt tokens of a step, which bounds the memory of long prompts."""


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
        prefix_caching: bool = False,
        cuda_graph: bool = False,
        fast_decoder: FastDecoder | None = None,
    ) -> None:
        """program:        runs the LLM with onnxruntime; None: with torch.
        prefix_caching: keep the KV cache of answered conversations for later ones that begin alike. If it is enabled,
                        the weights must not change.
        cuda_graph:     run decode steps at fixed addresses, on CUDA as a CUDA graph; the weights must not move.
        fast_decoder:   runs the forward passes on a CPU.
        """
        check_attention(model.config.text_config)
        self.model, self.processor = model.eval(), processor
        self.prefix_caching = prefix_caching
        self._program, self._fast_decoder, self._cuda_graph = program, fast_decoder, cuda_graph
        self._detokenizer = detokenizer_of(processor.tokenizer)
        self._stop_ids = _stop_ids(model, processor)
        self._offline = _Offline(self)

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
        prefix_caching: bool = True,
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
        prefix_caching:  see the constructor.
        events:          logs the chosen backend.
        loading:         further arguments of `load_model`.

        Raises ConfigError if onnxruntime is missing, or does not support the model or the device.
        """
        check_backend(backend, head_bits, threads, str(device), activation_bits)
        kind = choose_dtype(dtype, device) if dtype == "auto" else dtype
        model, processor = load_model(path, dtype=kind, device=device, **loading)
        bits = {"head_bits": head_bits, "activation_bits": activation_bits}
        return Engine.on_backend(
            model,
            processor,
            backend,
            **bits,
            threads=threads,
            release_weights=True,
            prefix_caching=prefix_caching,
            events=events,
        )

    @staticmethod
    def on_backend(
        model: VilaForConditionalGeneration,
        processor: VilaProcessor,
        backend: str = "auto",
        *,
        prefix_caching: bool = True,
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
            prefix_caching=prefix_caching,
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

        It shares the weights, the KV cache and the vision cache, whose keys include the vision settings.
        """
        processor = self.processor.with_vision(image_mode=image_mode, exif_orientation=exif_orientation)
        if processor is self.processor:
            return self
        other = copy.copy(self)
        other.processor = processor
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
        features = self._offline.scheduler.runner.features
        requests = [
            self.new_request(messages, chosen, template, features, index=index, streams=False)
            for index, messages in enumerate(conversations)
        ]
        self._offline.run(requests)
        return [request.handle.generation() for request in requests]

    def stream(
        self, messages: Conversation, sampling: SamplingParams | None = None, *, template: str = "", **options: Any
    ) -> Iterator[TokenEvent]:
        """Yield the answer in pieces, which joined and stripped are the result of `generate`.

        Partial characters and possible beginnings of stop strings are held back until the next token.
        """
        chosen = choose_sampling(sampling, options)
        features = self._offline.scheduler.runner.features
        return self._offline.stream(self.new_request(messages, chosen, template, features))

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
        sampling, features = SamplingParams(max_new_tokens=1), self._offline.scheduler.runner.features
        requests = [self._request(row, sampling, template, features) for row in rows]
        for request, row in zip(requests, rows, strict=True):
            request.targets = {place: label for place, label in enumerate(row.labels) if place and label != IGNORE}
        self._offline.run([request for request in requests if request.targets])
        return [request.scores for request in requests]

    def new_scheduler(self, max_num_seqs: int, kv_tokens: int, prefill_chunk: int) -> Scheduler:
        """Return a scheduler with its own KV cache.

        max_num_seqs:  requests that run together.
        kv_tokens:     capacity of the KV cache; 0: see `new_runner`.
        prefill_chunk: maximum prompt tokens per step.
        """
        runner, tokens = new_runner(
            self.model,
            max_num_seqs,
            kv_tokens,
            program=self._program,
            fast_decoder=self._fast_decoder,
            cuda_graph=self._cuda_graph,
        )
        return Scheduler(runner, KVCachePool(runner.cache, tokens), prefill_chunk)

    def new_request(
        self,
        messages: Conversation,
        sampling: SamplingParams,
        template: str,
        features: VisionCache,
        *,
        index: int = 0,
        on_event: OnEvent | None = None,
        streams: bool = True,
    ) -> Request:
        """Return a request for a scheduler, with its prompt tokenized and its images decoded.

        features: vision cache of the scheduler; images that it has are not preprocessed.
        index:    index of the conversation in its batch, which selects the random numbers of sampling.
        """
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
        request = self._request(tokens, sampling, template, features, index)
        request.handle = RequestHandle(len(tokens.ids), request.answer, dropped, on_event, streams=streams)
        return request

    def _request(
        self, tokens: Tokens, sampling: SamplingParams, template: str, features: VisionCache, index: int = 0
    ) -> Request:
        prompt, answer = build_prompt(tokens, self.processor), self._answer(template, sampling.stop)
        drafts = sampling.prompt_lookup_tokens
        return Request(
            RequestHandle(len(prompt.ids), answer, 0, streams=False),
            prompt,
            content_keys(prompt),
            sampling,
            answer,
            Sampler(sampling, prompt, index),
            pixels={image.key: image.preprocess() for image in features.missing(prompt.images)},
            lookup=PromptLookup(text_of(prompt), drafts) if drafts else None,
        )

    def _answer(self, template: str, stop: Sequence[str] = ()) -> Answer:
        special = self.processor.span_tokenizer.special_ids
        stops = (*self.processor.find_template(template).stop, *stop)
        ids = self._stop_ids | {special[text] for text in stops if text in special}
        return Answer(self._detokenizer, ids, tuple(text for text in stops if text not in special))

    @property
    def _context(self) -> int:
        return self.model.config.context_length


class _Offline:
    """Scheduler of an engine's own methods, stepped by the threads that wait for answers."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._lock = engine, threading.Lock()
        self._scheduler: Scheduler | None = None

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler; its KV cache is allocated at first use."""
        with self._lock:
            if self._scheduler is None:
                self._scheduler = self._engine.new_scheduler(_MAX_NUM_SEQS, 0, _PREFILL_CHUNK)
            return self._scheduler

    def run(self, requests: Sequence[Request]) -> None:
        """Step until the requests have ended. Raises the first error of a request."""
        for _ in self._steps(requests):
            pass

    def stream(self, request: Request) -> Iterator[TokenEvent]:
        """Step until the request has ended, and yield its events."""
        for _ in self._steps([request]):
            yield from request.handle.new_events()
        yield from request.handle.new_events()

    def _steps(self, requests: Sequence[Request]) -> Iterator[None]:
        """Yield after every step until the requests have ended; the others are cancelled if the caller stops."""
        scheduler = self.scheduler
        with self._lock:
            for request in requests:
                scheduler.add(request)
        try:
            while not all(request.handle.done for request in requests):
                with self._lock, torch.inference_mode():
                    self._step(scheduler)
                yield
        finally:
            self._close(scheduler, requests)

    def _step(self, scheduler: Scheduler) -> None:
        try:
            scheduler.step()
        except torch.AcceleratorError:
            raise
        except BaseException as error:
            # The step is incomplete, also for requests of other threads.
            scheduler.fail(error)
            raise

    def _close(self, scheduler: Scheduler, requests: Sequence[Request]) -> None:
        for request in requests:
            request.handle.cancelled = not request.handle.done
        # The garbage collector may close a stream inside a step, also of this thread; the next step ends its request.
        if not self._lock.acquire(blocking=False):
            return
        try:
            for request in requests:
                if not request.handle.done:
                    scheduler.end(request, CancelledError("the request was cancelled"))
            if not self._engine.prefix_caching and not scheduler.running:
                # The weights, and so the meaning of cached values, may change between calls.
                scheduler.pool.drop_prefixes()
        finally:
            self._lock.release()


def _stop_ids(model: VilaForConditionalGeneration, processor: VilaProcessor) -> frozenset[int]:
    """Return the ids of the EOS token and of the family's stop tokens that are special tokens of the tokenizer."""
    span = processor.span_tokenizer
    ids = {span.eos_id} if span.eos_id is not None else set()
    family = find_family(model.config.text_config.model_type)
    ids |= {span.special_ids[token] for token in family.stop_tokens if token in span.special_ids}
    return frozenset(ids)
