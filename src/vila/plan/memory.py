"""Predict the memory of a training step on one device, by simulating forward pass, backward pass and update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from vila.plan.flops import TrainableParts, count_trainable
from vila.plan.model_shape import Matrix, ModelShape, Stack, count_parameters

_FLOAT32 = 4
_READS_INPUT = ("q_proj", "k_proj", "v_proj")
_READS_NORM = ("gate_proj", "up_proj")


def decoder_saved(stack: Stack, trainable: TrainableParts, size: int, *, masked: bool = False) -> int:
    """Return the bytes per token that a decoder block (gated MLP, RMS norms) saves for its backward pass.

    size:   bytes per element in the forward pass.
    masked: whether attention has an explicit mask, for which keys and values are repeated for each query head.
    """
    width, mlp = stack.width, stack.mlp_width
    queries = stack.heads * stack.head_width
    keys = queries if masked else stack.kv_heads * stack.head_width
    trained = {m.name.rpartition(".")[2] for m in stack.matrices if trainable.is_trained(m.name)}
    # Norms save their input in float32; a trainable weight saves its input.
    total = 2 * (_FLOAT32 * width + size * width * trainable.trains_norms)
    total += size * width * bool(trained & set(_READS_INPUT)) + size * width * bool(trained & set(_READS_NORM))
    total += size * (2 * queries + 2 * keys) + _FLOAT32 * stack.heads
    # Gate before and after the activation, and up; also their product if down_proj is trainable.
    total += size * mlp * (3 + ("down_proj" in trained))
    return total + sum(_adapter_saved(m, trainable, size) for m in stack.matrices if trainable.has_adapter(m.name))


def _adapter_saved(matrix: Matrix, trainable: TrainableParts, size: int) -> int:
    """Return the bytes that an adapter saves: its input after dropout, the dropout mask, and the output of A."""
    saved = (size + (size if trainable.dropout else 0)) * matrix.inputs
    return saved + size * trainable.rank


def decoder_working(stack: Stack, trainable: TrainableParts, size: int) -> int:
    """Return the extra bytes per token in the backward pass of a decoder block: in the MLP and of its output."""
    saves_product = any(trainable.is_trained(m.name) and m.name.endswith("down_proj") for m in stack.matrices)
    return size * (stack.mlp_width * (3 - saves_product) + stack.width)


def tower_saved(stack: Stack, size: int) -> int:
    """Return the bytes per token that a block of a trainable tower (plain MLP, layer norms) saves."""
    queries = stack.heads * stack.head_width
    wide = stack.mlp_width * (2 + stack.two_step_activation)
    scaled = 2 * stack.width * stack.layer_scale
    return size * (4 * stack.width + 4 * queries + wide + scaled) + _FLOAT32 * (stack.heads + 4)


def tower_working(stack: Stack, size: int) -> int:
    """Return the extra bytes per token in the backward pass of a tower block, or in its forward pass if frozen."""
    return size * (stack.mlp_width * (1 + stack.two_step_activation) + 2 * stack.width)


_MOMENTS = 8
"""Bytes of the two AdamW moments of a parameter."""
_CHUNK_BYTES = 2**27
"""Bytes of float32 logits that are computed at a time."""


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """Settings that determine the memory of a model in training.

    dtype_bytes:       bytes per element in the forward pass, 2 or 4.
    num_shards:        ranks that weights, gradients and optimizer state are sharded over; 1: no sharding.
    reshard:           whether gathered weights are freed after the forward pass of a block.
    recompute:         every Nth block is recomputed in the backward pass (gradient checkpointing); 0: none.
    accumulates:       whether a step has several micro-batches.
    has_mask:          whether attention has explicit masks, as on the CPU.
    has_feature_cache: whether vision features are read from the cache.
    llm_bits:          bits per weight of the frozen LLM under adapters.
    """

    dtype_bytes: int = 2
    num_shards: int = 1
    reshard: bool = True
    recompute: int = 0
    accumulates: bool = False
    has_mask: bool = False
    has_feature_cache: bool = False
    llm_bits: int = 16


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A micro-batch on one device: `rows` sequences of `length` tokens; `images` and `supervised` tokens in total."""

    rows: int
    length: int
    images: int
    supervised: int

    @property
    def positions(self) -> int:
        """Number of tokens, padding included."""
        return self.rows * self.length


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device at one moment of a step.

    weights:     weights, and float32 master weights.
    gathered:    all-gathered weights, and communication buffers.
    activations: tensors saved for the backward pass.
    working:     temporary tensors: gradients of activations, logits.
    """

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    gathered: float = 0.0
    activations: float = 0.0
    working: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(float(getattr(self, field.name)) for field in fields(self))


def peak_memory(shape: ModelShape, trainable: TrainableParts, config: MemoryConfig, micro: MicroBatch) -> Memory:
    """Return the memory at the peak of a step, after the first step."""
    return max(_moments(shape, trainable, config, micro), key=lambda moment: moment.total)


def static_memory(shape: ModelShape, trainable: TrainableParts, config: MemoryConfig) -> dict[str, Memory]:
    """Return the memory between steps, by component: weights and optimizer state."""
    every, num_trainable = count_parameters(shape), count_trainable(shape, trainable)
    own = _FLOAT32 if config.num_shards > 1 or config.dtype_bytes == _FLOAT32 else config.dtype_bytes + _FLOAT32
    return {
        name: Memory(
            weights=(_frozen_bytes(name, shape, trainable, config) + own * num_trainable[name]) / config.num_shards,
            optimizer=_MOMENTS * num_trainable[name] / config.num_shards,
        )
        for name in every
    }


def memory_by_component(
    shape: ModelShape, trainable: TrainableParts, config: MemoryConfig, micro: MicroBatch
) -> dict[str, Memory]:
    """Return `static_memory` plus all gradients and saved activations of a step; the peak is below their sum."""
    num_trainable, saved = count_trainable(shape, trainable), _Activations(shape, trainable, config, micro)
    tower = saved.tower(shape.tower.used) if trainable.vision else 0.0
    activations = {
        "tower": tower,
        "projector": saved.media - tower,
        "blocks": saved.below(shape.llm.layers) - saved.media + saved.top,
    }
    return {
        name: replace(
            memory,
            gradients=_FLOAT32 * num_trainable[name] / config.num_shards,
            activations=activations.get(name, 0.0),
        )
        for name, memory in static_memory(shape, trainable, config).items()
    }


def _frozen_bytes(name: str, shape: ModelShape, trainable: TrainableParts, config: MemoryConfig) -> float:
    """Return the bytes of the frozen weights of a component, unsharded."""
    count = count_parameters(shape)[name]
    if not trainable.rank or name != "blocks":
        return float(count - count_trainable(shape, trainable)[name]) * config.dtype_bytes
    matrices = shape.llm.layers * sum(matrix.weights for matrix in shape.llm.matrices)
    # NF4 has a float32 scale per 64 weights; int8 one per row, which is negligible.
    per_number = config.dtype_bytes if config.llm_bits == 16 else config.llm_bits / 8 + (config.llm_bits == 4) / 16
    return matrices * per_number + (count - matrices) * config.dtype_bytes


def _moments(shape: ModelShape, trainable: TrainableParts, config: MemoryConfig, micro: MicroBatch) -> Iterator[Memory]:
    """Yield the moments of a step at which memory can peak."""
    parts = static_memory(shape, trainable, config).values()
    rest = Memory(weights=sum(one.weights for one in parts), optimizer=sum(one.optimizer for one in parts))
    num_trainable = count_trainable(shape, trainable)
    total = sum(num_trainable.values())
    # Without sharding, a gradient has the dtype of the forward pass until it is added to the float32 sum.
    own = config.dtype_bytes if config.num_shards == 1 else _FLOAT32 / config.num_shards
    summed = config.accumulates and config.num_shards == 1 and config.dtype_bytes < _FLOAT32
    before = _FLOAT32 * total if summed else own * total * config.accumulates

    def at(grown: float, gathered: float, activations: float, working: float) -> Memory:
        grown = own * grown if summed or not config.accumulates else 0.0
        return Memory(rest.weights, before + grown, rest.optimizer, gathered, activations, working)

    saved = _Activations(shape, trainable, config, micro)
    gathered = _Gathered(shape, trainable, config)
    yield at(0, gathered.units(shape.tower.block), saved.shared, saved.tower_forward)
    yield at(0, gathered.units(shape.llm.block), saved.below(shape.llm.layers) + saved.top, saved.loss)
    grown: float = num_trainable["head"] + (num_trainable["embeddings"] if shape.tied else 0)
    block = (num_trainable["blocks"] - shape.final_norm * trainable.trains_norms) / shape.llm.layers
    for index in reversed(range(shape.llm.layers)):
        if saved.graph:
            grown += block
            left = (index + 1) / shape.llm.layers
            traffic = gathered.units(shape.llm.block, left) + gathered.reduced(block)
            yield at(grown, traffic, saved.below(index), saved.block_backward(index))
    grown = total - num_trainable["tower"] - num_trainable["projector"]
    yield at(
        grown,
        gathered.units(0, 0.0) + gathered.reduced(shape.embedding * trainable.trains_vocabulary),
        saved.media + saved.shared,
        saved.embeds,
    )
    if trainable.vision:
        for index in reversed(range(shape.tower.used)):
            done = total - num_trainable["tower"] + (shape.tower.used - index) * shape.tower.block
            traffic = gathered.units(shape.tower.block, 0.0) + gathered.reduced(shape.tower.block)
            yield at(done, traffic, saved.tower(index) + saved.shared, saved.tower_backward(index))
    yield Memory(
        rest.weights, _FLOAT32 * total / config.num_shards, rest.optimizer, gathered.units(0, 0.0), saved.shared, 0
    )


class _Gathered:
    """All-gathered weights of FSDP2: the root module, the current unit, and the prefetched next unit."""

    def __init__(self, shape: ModelShape, trainable: TrainableParts, config: MemoryConfig) -> None:
        self.config = config
        every = count_parameters(shape)
        self.root = every["embeddings"] + every["head"] + shape.final_norm + shape.tower_rest + shape.tower_unused
        self.blocks = shape.llm.layers * shape.llm.block
        self.tower = shape.tower.used * shape.tower.block

    def units(self, unit: int, left: float = 1.0) -> float:
        """Return the bytes of root and two units; without `reshard`, of root and the fraction `left` of all blocks."""
        if self.config.num_shards == 1:
            return 0.0
        held = 2 * unit if self.config.reshard else self.tower + left * self.blocks
        return self.config.dtype_bytes * (self.root + held)

    def reduced(self, unit: float) -> float:
        """Return the bytes of the unreduced gradients of a unit: in the dtype of the forward pass, and in float32."""
        return 0.0 if self.config.num_shards == 1 else (self.config.dtype_bytes + _FLOAT32) * unit


class _Activations:
    """Bytes of saved activations and temporary tensors of a micro-batch, by progress of the backward pass."""

    def __init__(self, shape: ModelShape, trainable: TrainableParts, config: MemoryConfig, micro: MicroBatch) -> None:
        self.shape, self.trainable, self.config, self.micro = shape, trainable, config, micro
        size = config.dtype_bytes
        positions, width = micro.positions, shape.llm.width
        # Every block converts a boolean mask to the dtype of the forward pass and saves it.
        mask = size * micro.rows * micro.length**2 if config.has_mask else 0
        self._saved = positions * decoder_saved(shape.llm, trainable, size, masked=config.has_mask) + mask
        self._input = positions * size * width
        self._working = positions * decoder_working(shape.llm, trainable, size)
        self._tower_positions = micro.images * shape.views * shape.tower_tokens
        # Held for the whole step: float32 pixels (or cached features), and the mask.
        image: float = (
            _FLOAT32 * shape.pixels if not config.has_feature_cache else size * shape.patches * shape.tower.width
        )
        self.shared = float(micro.images * image)
        self.shared += micro.rows * micro.length**2 if config.has_mask else 0
        self.top = positions * width * (_FLOAT32 + size * (1 + trainable.trains_norms))
        self.embeds = 2 * self._input + size * shape.embedding * trainable.trains_vocabulary * (not shape.tied)

    @property
    def graph(self) -> bool:
        """Whether decoder blocks save activations: something in them or before them is trainable."""
        return self.trainable.below_llm or self.trainable.llm

    def _recomputed(self, index: int) -> bool:
        return bool(self.config.recompute) and index % self.config.recompute == 0

    def _recomputed_below(self, index: int) -> int:
        """Return how many of the first `index` blocks are recomputed."""
        return math.ceil(index / self.config.recompute) if self.config.recompute else 0

    def below(self, index: int) -> float:
        """Return the bytes saved by everything before block `index`."""
        again = self._recomputed_below(index)
        blocks = again * self._input + (index - again) * self._saved if self.graph else 0
        return blocks + self.media + self.shared

    def block_backward(self, index: int) -> float:
        """Return the extra bytes in the backward pass of a block, its own activations included."""
        again = self._input if self._recomputed(index) else 0
        return self._saved + self._working + again

    @property
    def loss(self) -> float:
        """Bytes of hidden states of supervised tokens with gradients, a chunk of logits, and the head's gradient."""
        rows = self.micro.supervised
        hidden = 2 * rows * self.shape.llm.width * self.config.dtype_bytes
        chunk = min(rows, max(1, _CHUNK_BYTES // (_FLOAT32 * self.shape.vocabulary)))
        # In bfloat16, logits and the gradient of the head also exist in that dtype.
        rounded = self.config.dtype_bytes if self.config.dtype_bytes < _FLOAT32 else 0
        logits = chunk * self.shape.vocabulary * (rounded + _FLOAT32)
        head = self.shape.embedding * self.trainable.trains_vocabulary * (rounded + _FLOAT32)
        return hidden + logits + head

    @property
    def media(self) -> float:
        """Bytes saved by projector and tower."""
        projector = 0.0
        vectors = self.micro.images * self.shape.media_tokens
        if self.trainable.projector or self.trainable.vision:
            hidden = sum(matrix.outputs for matrix in self.shape.projector[:-1])
            projector = self.config.dtype_bytes * vectors * hidden * (1 + self.trainable.projector)
            if self.shape.merges:
                projector += 2 * self.config.dtype_bytes * vectors * self.shape.projector[0].inputs
        features = self.config.dtype_bytes * self._tower_positions * self.shape.tower.width * self.trainable.projector
        pixels = self.config.dtype_bytes * self.micro.images * self.shape.pixels * self.trainable.vision
        return projector + features + pixels + (self.tower(self.shape.tower.used) if self.trainable.vision else 0)

    def tower(self, index: int) -> float:
        """Return the bytes saved by the tower blocks before `index`."""
        again = self._recomputed_below(index)
        inputs = self.config.dtype_bytes * self.shape.tower.width
        saved = again * inputs + (index - again) * tower_saved(self.shape.tower, self.config.dtype_bytes)
        return self._tower_positions * float(saved)

    def tower_backward(self, index: int) -> float:
        """Return the extra bytes in the backward pass of a tower block."""
        size = self.config.dtype_bytes
        return self._tower_positions * float(
            tower_saved(self.shape.tower, size) + tower_working(self.shape.tower, size)
        )

    @property
    def tower_forward(self) -> float:
        """Extra bytes in the forward pass of a frozen tower."""
        if self.config.has_feature_cache:
            return 0.0
        stack, size = self.shape.tower, self.config.dtype_bytes
        pixels = self.config.dtype_bytes * self.micro.images * self.shape.pixels
        return pixels + self._tower_positions * float(size * (4 * stack.width + 2 * stack.mlp_width))
