"""`vila bench decode`: prefill and decode speed of a model by backend, dtype, context length and batch size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vila.chat.detokenize import Detokenizer
from vila.core.errors import ConfigError
from vila.core.progress import SILENT, Events, task
from vila.engine.attention import ForwardBatch, TokenRange
from vila.engine.backend import choose_cuda_graph, choose_fast_decoder, choose_program, new_runner
from vila.engine.kv_cache import KVCachePool
from vila.engine.request import Answer, Request, RequestHandle
from vila.engine.runner_torch import ModelRunner
from vila.engine.sampler import Sampler
from vila.engine.sampling_params import SamplingParams
from vila.engine.scheduler import Scheduler
from vila.engine.vision_cache import Prompt
from vila.kernels.int4 import Int4Linear, reference_backend
from vila.model.int4_weights import int4_layers
from vila.model.modeling import VilaForConditionalGeneration

if TYPE_CHECKING:
    from vila.engine.onnx_weights import ActivationBits


# B rows  S tokens  V vocab

_PREFILL_CHUNK = 2048
_CLEAR = 4.0
"""A top-1 token is clear if its logit leads the second by this many times the error of a logit."""
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class Agreement:
    """Top-1 agreement of a backend with the reference over `tokens` positions of a given text.

    same:       fraction of positions with the same top-1 token.
    clear:      fraction of positions where the reference's lead over its second token exceeds the backend's error.
                Random weights give nearly flat logits, whose order is noise in any arithmetic.
    same_clear: fraction of the clear positions with the same top-1 token; 1 if there are none.
    error:      RMS difference of the logits, relative to their standard deviation.
    nll_change: mean change of the text's negative log-likelihood, in nats per token.
    """

    tokens: int
    same: float
    clear: float
    same_clear: float
    error: float
    nll_change: float


def compare(fast_SV: Tensor, exact_SV: Tensor, following_S: Tensor) -> Agreement:
    """Compare logits of a backend and of the reference at the same positions; following_S: the next tokens."""
    difference = fast_SV - exact_SV
    noise = (difference - difference.mean(-1, keepdim=True)).pow(2).mean().sqrt()
    top = exact_SV.topk(2, dim=-1)
    same_S = fast_SV.argmax(-1) == top.indices[:, 0]
    clear_S = top.values[:, 0] - top.values[:, 1] > _CLEAR * noise
    change = torch.nn.functional.cross_entropy(fast_SV, following_S) - torch.nn.functional.cross_entropy(
        exact_SV, following_S
    )
    return Agreement(
        tokens=len(following_S),
        same=same_S.float().mean().item(),
        clear=clear_S.float().mean().item(),
        same_clear=same_S[clear_S].float().mean().item() if clear_S.any() else 1.0,
        error=(noise / exact_SV.std()).item(),
        nll_change=change.item(),
    )


@torch.inference_mode()
def agreement(
    model: VilaForConditionalGeneration, runner: ModelRunner, tokens: int, text: list[int] | None = None
) -> Agreement:
    """Compare decode steps of a backend with one forward pass of the reference: torch, in the model's dtype.

    text: token ids, at least tokens + 1; None: random ones.
    """
    given = (
        text
        or torch.randint(
            0, int(model.config.text_config.vocab_size), (tokens + 1,), generator=torch.Generator().manual_seed(1)
        ).tolist()
    )
    rows = [
        runner.forward(ForwardBatch([TokenRange(0, at, [token])]))[0].clone() for at, token in enumerate(given[:tokens])
    ]
    following = torch.tensor(given[1 : tokens + 1], device=model.device)
    return compare(torch.stack(rows), reference_logits(model, given[:tokens]), following)


@torch.inference_mode()
def reference_logits(model: VilaForConditionalGeneration, ids: list[int]) -> Tensor:
    """Return logits [S, V] of one forward pass without a cache, with the reference kernel in INT4 layers."""
    with reference_backend(model, model.dtype):
        logits: Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()
    return logits


def read_bandwidth(device: str, num_bytes: int = 2**30) -> float:
    """Return the memory bandwidth in bytes per second: best of five sums of a buffer larger than the caches."""
    buffer = torch.ones(num_bytes // 4, device=device)
    seconds = []
    for _ in range(5):
        synchronize(device)
        begin = time.perf_counter()
        buffer.sum()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return buffer.nbytes / min(seconds)


def synchronize(device: str) -> None:
    """Wait until the device has finished; no-op on a CPU."""
    if device != "cpu":
        torch.cuda.synchronize()


def reset_peak_memory(device: str) -> None:
    """Reset the peak memory counter, if the system supports it."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5", encoding="ascii")


def peak_bytes(device: str) -> int | None:
    """Return the peak memory since `reset_peak_memory`, of the GPU or of the process; None if unknown."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    if not _STATUS.exists():
        return None
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


@dataclass(frozen=True, slots=True)
class Load:
    """A workload: `batch` prompts of `context` tokens, and `tokens` new tokens each.

    runs:   measured runs, after one warm-up run.
    check:  number of positions at which top-1 tokens are compared with the reference; 0 disables it.
    """

    context: int = 16
    batch: int = 1
    tokens: int = 128
    runs: int = 5
    check: int = 512

    def __post_init__(self) -> None:
        minimum = {"context": 1, "batch": 1, "tokens": 2, "runs": 1, "check": 0}
        problems = [
            f"{name}={getattr(self, name)}: expected at least {low}"
            for name, low in minimum.items()
            if getattr(self, name) < low
        ]
        if problems:
            raise ConfigError.collect("bench decode", problems)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model with its backend. A decode step reads `step_bytes` of weights and `token_bytes` per cached token."""

    title: str
    precision: str
    backend: str
    device: str
    new_runner: Callable[[int], tuple[ModelRunner, int]]
    model: VilaForConditionalGeneration
    step_bytes: int
    token_bytes: int


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, minimum and maximum over all runs."""

    median: float
    minimum: float
    maximum: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Result:
    """Measurements of a subject under a load. Rates are tokens per second over the whole batch.

    decode, prefill:  of all tokens after the first, and of the prompts.
    first_token_s:    time until every answer has its first token.
    step_ms:          time of a decode step, including sampling.
    bandwidth:        memory bandwidth in bytes per second, measured before every run.
    of_limit:         bytes that a step must read per second, as a fraction of the bandwidth.
    peak_bytes:       peak memory of the GPU, or of the process on a CPU; None if unknown.
    """

    title: str
    precision: str
    backend: str
    device: str
    load: Load
    decode: Spread
    prefill: Spread
    first_token_s: Spread
    step_ms: float
    step_bytes: int
    bandwidth: float
    of_limit: float
    peak_bytes: int | None
    agreement: Agreement | None

    def facts(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def subject_of(
    model: VilaForConditionalGeneration,
    title: str,
    *,
    backend: str = "auto",
    head_bits: int = 0,
    activation_bits: ActivationBits | Literal[0] = 0,
    cuda_graph: bool | None = None,
    events: Events = SILENT,
) -> Subject:
    """Return a model with the backend that the engine selects. cuda_graph: None: the engine's choice."""
    device = model.device.type
    program = choose_program(model, backend, head_bits=head_bits, activation_bits=activation_bits, events=events)
    precision = "int4" if any(int4_layers(model)) else str(model.dtype).removeprefix("torch.")
    config = model.config.text_config
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    keys = 2 * int(config.num_hidden_layers) * int(config.num_key_value_heads) * width
    if program is not None:
        rounded = f", {program.activation_bits}-bit activations" if precision == "int4" else ""
        name = f"onnx, {program.head_bits}-bit head{rounded}, {program.threads} threads"
        kind = precision if precision == "int4" else "float32"
        create = partial(new_runner, model, program=program)
        return Subject(title, kind, name, device, create, model, program.weight_bytes, 4 * keys)
    fixed = choose_cuda_graph(model, events) if cuda_graph is None else cuda_graph
    create = partial(new_runner, model, fast_decoder=choose_fast_decoder(model), cuda_graph=fixed)
    products = {layer.backend for layer in model.modules() if isinstance(layer, Int4Linear)}
    name = "torch" + "".join(f", {product}" for product in sorted(products)) + (", CUDA graphs" if fixed else "")
    return Subject(title, precision, name, device, create, model, step_bytes(model), keys * model.dtype.itemsize)


def step_bytes(model: VilaForConditionalGeneration) -> int:
    """Return the stored bytes of the weights that a decode step reads: blocks, final norm and LM head."""
    modules = [*model.get_decoder().layers.modules(), model.get_decoder().norm, model.get_output_embeddings()]  # type: ignore[union-attr]
    stored = [
        value
        for module in modules
        for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if not name.startswith("prepared_")
    ]
    return sum(value.nbytes for value in stored)


@torch.inference_mode()
def measure(subject: Subject, load: Load, events: Events = SILENT) -> Result:
    """Measure a subject under a load."""
    same = agreement(subject.model, subject.new_runner(1)[0], load.check) if load.check else None
    runner, tokens = subject.new_runner(load.batch)
    scheduler = Scheduler(runner, KVCachePool(runner.cache, tokens), _PREFILL_CHUNK)
    prompts = list(_prompts(subject.model, load))
    first, rates, prefills, steps, bandwidths = [], [], [], [], []
    peaks: list[int | None] = []
    with task(events, f"{subject.title} {subject.precision}", load.runs + 1, "runs"):
        for number in range(load.runs + 1):
            bandwidth = read_bandwidth(subject.device)
            reset_peak_memory(subject.device)
            seconds, times = time_steps(scheduler, prompts, load)
            peaks.append(peak_bytes(subject.device))
            events.advanced(f"{subject.title} {subject.precision}")
            if number:
                bandwidths.append(bandwidth)
                first.append(seconds)
                prefills.append(load.batch * load.context / seconds)
                rates.append(load.batch * len(times) / sum(times))
                steps += times
    step = statistics.median(steps)
    # On average the cache holds half of the new tokens.
    read = subject.step_bytes + load.batch * subject.token_bytes * (load.context + load.tokens / 2)
    bandwidth = statistics.median(bandwidths)
    return Result(
        title=subject.title,
        precision=subject.precision,
        backend=subject.backend,
        device=subject.device,
        load=load,
        decode=Spread.of(rates),
        prefill=Spread.of(prefills),
        first_token_s=Spread.of(first),
        step_ms=1e3 * step,
        step_bytes=int(read),
        bandwidth=bandwidth,
        of_limit=read / step / bandwidth,
        peak_bytes=max((peak for peak in peaks if peak), default=None),
        agreement=same,
    )


def time_steps(scheduler: Scheduler, prompts: Sequence[Prompt], load: Load) -> tuple[float, list[float]]:
    """Return the time to the first tokens and the times of all steps after it, in seconds."""
    scheduler.pool.drop_prefixes()
    requests = [_request(prompt, load.tokens) for prompt in prompts]
    begin = time.perf_counter()
    for request in requests:
        scheduler.add(request)
    while any(request.taken == 0 for request in requests):
        scheduler.step()
    first = time.perf_counter() - begin
    times = []
    while not all(request.handle.done for request in requests):
        begin = time.perf_counter()
        scheduler.step()
        times.append(time.perf_counter() - begin)
    return first, times


def _request(prompt: Prompt, tokens: int) -> Request:
    """Return a request that ends after `tokens` new tokens."""
    answer = Answer(Detokenizer(lambda ids: "", lambda token: True), frozenset(), ())
    handle = RequestHandle(len(prompt.ids), answer, 0, streams=False)
    sampling = SamplingParams(max_new_tokens=tokens)
    return Request(handle, prompt, list(prompt.ids), sampling, answer, Sampler(sampling, prompt))


def _prompts(model: VilaForConditionalGeneration, load: Load) -> Iterator[Prompt]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(load.batch):
        vocab = int(model.config.text_config.vocab_size)
        yield Prompt(torch.randint(0, vocab, (load.context,), generator=generator).tolist())


_ROWS = (("VILA-7B", "fp16"), ("VILA-7B", "int4"), ("VILA-13B", "fp16"), ("VILA-13B", "int4"))
# Tokens per second at batch size 1 of the original INT4 engine (README of llm-awq, early 2024).
_PUBLISHED: Mapping[str, tuple[str, ...]] = {
    "A100": ("81.6", "155.3", "48.5", "102.1"),
    "RTX 4090": ("58.5", "168.1", "out of memory", "99.0"),
    "Orin": ("11.5", "35.6", "6.1", "17.5"),
}


def result_table(results: Sequence[Result]) -> str:
    """Return all results as a markdown table, with the measured memory bandwidth above it."""
    rows = [_row(result) for result in results]
    lines = [_line(list(rows[0])), _line(["---"] * len(rows[0])), *(_line(list(row.values())) for row in rows)]
    speeds = [result.bandwidth for result in results]
    bandwidths = " to ".join(f"{speed / 1e9:.1f}" for speed in sorted({min(speeds), max(speeds)}))
    return f"Memory bandwidth: {bandwidths} GB/s.\n\n" + "\n".join(lines)


def device_table(results: Sequence[Result], machine: str) -> str:
    """Return a markdown table of tokens per second at batch size 1: published values, and those of this machine.

    16-bit models of both dtypes count as fp16. Cells without a measurement are empty; of several results of a model
    the one with the shortest context is shown.
    """
    columns = {f"{name} (published)": values for name, values in _PUBLISHED.items()}
    columns[f"{machine} (measured)"] = tuple(_measured(results, title, kind) for title, kind in _ROWS)
    lines = [_line(["tokens/s", "weights", *columns]), _line(["---"] * (2 + len(columns)))]
    for row, (title, kind) in enumerate(_ROWS):
        lines.append(_line([title, kind, *(values[row] for values in columns.values())]))
    return "\n".join(lines)


def _measured(results: Sequence[Result], title: str, kind: str) -> str:
    kinds = ("int4",) if kind == "int4" else ("float16", "bfloat16")
    found = [r for r in results if r.title == title and r.precision in kinds and r.load.batch == 1]
    return f"{min(found, key=lambda r: r.load.context).decode.median:.1f}" if found else ""


def _row(result: Result) -> dict[str, str]:
    """Return the cells of a result by column."""
    same = result.agreement
    return {
        "model": result.title,
        "weights": result.precision,
        "backend": result.backend,
        "context": str(result.load.context),
        "batch": str(result.load.batch),
        "tokens/s": f"{result.decode.median:.1f}",
        "min-max": f"{result.decode.minimum:.1f}-{result.decode.maximum:.1f}",
        "step, ms": f"{result.step_ms:.2f}",
        "prompt tokens/s": f"{result.prefill.median:.0f}",
        "first token, ms": f"{1e3 * result.first_token_s.median:.0f}",
        "of memory limit": f"{result.of_limit:.0%}",
        "peak, GB": "" if result.peak_bytes is None else f"{result.peak_bytes / 1e9:.2f}",
        "same top-1": "" if same is None else f"{same.same:.1%} of {same.tokens}",
        "where clear": "" if same is None else f"{same.same_clear:.1%} of {same.clear:.0%}",
    }


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
