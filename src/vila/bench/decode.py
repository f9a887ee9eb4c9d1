"""Tokens a second of one model: prompts and steps, by backend, number type, context and batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from vila.bench.agreement import Agreement, agreement
from vila.bench.memory import forget_peak, peak_bytes, read_bandwidth, wait
from vila.core.errors import ConfigError
from vila.core.events import SILENT, Events, task
from vila.engine.backend import choose_captured, choose_lean, choose_program
from vila.engine.batch import BatchRun, Run, group_prompts
from vila.engine.pictures import PictureFeatures, Prompt
from vila.engine.static_run import StaticRun
from vila.engine.static_step import StaticSteps
from vila.kernels.int4_linear import Int4Linear
from vila.model.int4 import int4_weights
from vila.model.vila import VilaForConditionalGeneration

if TYPE_CHECKING:
    from vila.engine.onnx.weights import ActivationBits

# B rows  V vocab


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a model: `batch` prompts of `context` tokens, slots of pictures included, and `tokens` new ones.

    runs:   measured ones, after one that warms up.
    check:  tokens on which the backend's likeliest tokens are compared with the reference's; 0 compares none.
    """

    context: int = 16
    batch: int = 1
    tokens: int = 128
    runs: int = 5
    check: int = 512

    def __post_init__(self) -> None:
        least = {"context": 1, "batch": 1, "tokens": 2, "runs": 1, "check": 0}
        problems = [
            f"{name}={getattr(self, name)}: from {low}" for name, low in least.items() if getattr(self, name) < low
        ]
        if problems:
            raise ConfigError.collect("bench decode", problems)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model with its backend. A step reads `step_bytes` of weights, and `token_bytes` of each token before."""

    title: str
    precision: str
    backend: str
    device: str
    new_run: Callable[[int], Run]
    model: VilaForConditionalGeneration
    step_bytes: int
    token_bytes: int


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of all runs, with the least and the greatest."""

    median: float
    least: float
    greatest: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured of a subject under a load. Rates are tokens a second over the whole batch.

    decode, prefill:  of all tokens after the first, and of the prompts.
    first_token_s:    seconds until every answer has its first token.
    step_ms:          of a step, choosing included.
    bandwidth:        bytes a second that this machine reads, measured before every run.
    of_limit:         bytes that a step must read over its time, as a share of the bandwidth.
    peak_bytes:       of the device's memory, or of the process on a CPU; None when unknown.
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
        """As plain data."""
        return asdict(self)


def subject_of(
    model: VilaForConditionalGeneration,
    title: str,
    *,
    backend: str = "auto",
    head_bits: int = 0,
    activation_bits: ActivationBits | Literal[0] = 0,
    captured: bool | None = None,
    events: Events = SILENT,
) -> Subject:
    """A model with the backend that the engine would take. captured: None is what the engine would do."""
    device = model.device.type
    program = choose_program(model, backend, head_bits=head_bits, activation_bits=activation_bits, events=events)
    precision = "int4" if int4_weights(model) else str(model.dtype).removeprefix("torch.")
    config = model.config.text_config
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    keys = 2 * int(config.num_hidden_layers) * int(config.num_key_value_heads) * width
    if program is not None:
        from vila.engine.onnx.run import OnnxRun

        rounded = f", activations {program.activation_bits} bit" if precision == "int4" else ""
        name = f"onnx, head {program.head_bits} bit{rounded}, {program.threads} threads"
        unseen = PictureFeatures(_no_pictures)
        new_run: Callable[[int], Run] = lambda capacity: OnnxRun(model, unseen, program, capacity)  # noqa: E731
        kind = precision if precision == "int4" else "float32"
        return Subject(title, kind, name, device, new_run, model, program.weight_bytes, 4 * keys)
    fixed = choose_captured(model, events) if captured is None else captured
    steps = StaticSteps(model) if fixed else None
    lean = choose_lean(model)

    def torch_run(capacity: int) -> Run:
        run = BatchRun(model, _no_pictures, capacity, lean)
        return run if steps is None else StaticRun(run, steps)

    products = {layer.backend for layer in model.modules() if isinstance(layer, Int4Linear)}
    name = "torch" + "".join(f", {product}" for product in sorted(products)) + (", captured" if fixed else "")
    return Subject(title, precision, name, device, torch_run, model, step_bytes(model), keys * model.dtype.itemsize)


def step_bytes(model: VilaForConditionalGeneration) -> int:
    """Bytes of weights that a step reads, as they are stored: blocks, last norm and head."""
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
    """Run a load as often as it asks for."""
    same = agreement(subject.model, subject.new_run, load.check) if load.check else None
    prompts = list(_prompts(subject.model, load))
    first, rates, prefills, steps, bandwidths = [], [], [], [], []
    peaks: list[int | None] = []
    with task(events, f"{subject.title} {subject.precision}", load.runs + 1, "runs"):
        for number in range(load.runs + 1):
            bandwidth = read_bandwidth(subject.device)
            forget_peak(subject.device)
            seconds, times = _run(subject, prompts, load)
            peaks.append(peak_bytes(subject.device))
            events.advanced(f"{subject.title} {subject.precision}")
            if number:
                bandwidths.append(bandwidth)
                first.append(seconds)
                prefills.append(load.batch * load.context / seconds)
                rates.append(load.batch * len(times) / sum(times))
                steps += times
    step = statistics.median(steps)
    # The cache is half full on average.
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


def _run(subject: Subject, prompts: Sequence[Prompt], load: Load) -> tuple[float, list[float]]:
    """Seconds to the first tokens, and of every step after them."""
    wait(subject.device)
    begin = time.perf_counter()
    run = subject.new_run(load.context + load.tokens)
    ids_B = run.prefill(prompts, group_prompts(prompts)).argmax(-1)
    ids_B.tolist()
    first = time.perf_counter() - begin
    times = []
    for _ in range(load.tokens - 1):
        begin = time.perf_counter()
        ids_B = run.step(ids_B).argmax(-1)
        ids_B.tolist()
        times.append(time.perf_counter() - begin)
    run.close([])
    return first, times


def _prompts(model: VilaForConditionalGeneration, load: Load) -> Iterator[Prompt]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(load.batch):
        vocab = int(model.config.text_config.vocab_size)
        yield Prompt(torch.randint(0, vocab, (load.context,), generator=generator).tolist())


def _no_pictures(pictures: Sequence[Any]) -> torch.Tensor:
    raise AssertionError("prompts of a benchmark have no pictures")
