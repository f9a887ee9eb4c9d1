"""Memory of a step on one device, predicted: a walk through forward pass, backward pass and update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from vila.plan.flops import Learning, count_learning
from vila.plan.model_shape import Matrix, ModelShape, Stack, count_parameters

# --- activations
# Bytes that a transformer block keeps for its backward pass, and those it needs while that runs.


_FLOAT32 = 4
_READS_INPUT = ("q_proj", "k_proj", "v_proj")
_READS_NORM = ("gate_proj", "up_proj")


def decoder_saved(stack: Stack, learning: Learning, size: int, *, masked: bool = False) -> int:
    """What a decoder block with gated MLP and RMS norms keeps.

    size:   bytes of a number in the forward pass.
    masked: whether attention is given an explicit mask, for which keys and values are repeated for each head.
    """
    width, mlp = stack.width, stack.mlp_width
    queries = stack.heads * stack.head_width
    keys = queries if masked else stack.kv_heads * stack.head_width
    learns = {m.name.rpartition(".")[2] for m in stack.matrices if learning.matrix(m.name)}
    # Norms compute in float32 and keep that copy; a weight that learns keeps what it is multiplied with.
    total = 2 * (_FLOAT32 * width + size * width * learning.norms)
    total += size * width * bool(learns & set(_READS_INPUT)) + size * width * bool(learns & set(_READS_NORM))
    total += size * (2 * queries + 2 * keys) + _FLOAT32 * stack.heads
    # Gate before and after its activation, and up; their product where the last Linear learns.
    total += size * mlp * (3 + ("down_proj" in learns))
    return total + sum(_adapter_saved(m, learning, size) for m in stack.matrices if learning.adapter(m.name))


def _adapter_saved(matrix: Matrix, learning: Learning, size: int) -> int:
    """An adapter keeps its own input, thinned by dropout, with the pattern; and the few numbers in its middle."""
    kept = (size + (size if learning.dropout else 0)) * matrix.inputs
    return kept + size * learning.rank


def decoder_working(stack: Stack, learning: Learning, size: int) -> int:
    """What the backward pass of a decoder block needs on top: the gradients inside the MLP, and the one it is given."""
    product_kept = any(learning.matrix(m.name) and m.name.endswith("down_proj") for m in stack.matrices)
    return size * (stack.mlp_width * (3 - product_kept) + stack.width)


def tower_saved(stack: Stack, size: int) -> int:
    """What a block of a tower that learns keeps: plain MLP and layer norms."""
    queries = stack.heads * stack.head_width
    wide = stack.mlp_width * (2 + stack.two_step_activation)
    scaled = 2 * stack.width * stack.layer_scale
    return size * (4 * stack.width + 4 * queries + wide + scaled) + _FLOAT32 * (stack.heads + 4)


def tower_working(stack: Stack, size: int) -> int:
    """What the backward pass of a tower's block, or its forward pass without one, needs on top."""
    return size * (stack.mlp_width * (1 + stack.two_step_activation) + 2 * stack.width)


_MOMENTS = 8
_CHUNK_BYTES = 2**27
"""Of the float32 logits that exist at one time."""


@dataclass(frozen=True, slots=True)
class Holding:
    """How a model is held while it learns.

    size:        bytes of a number in the forward pass, 2 or 4.
    dealt:       processes that weights, gradients and optimizer are dealt to; 1: each holds all.
    reshard:     whether gathered blocks are let go of after their forward pass.
    recompute:   every nth block is recomputed in the backward pass; 0: none.
    accumulated: whether a step has several micro-batches.
    masked:      whether attention is given explicit masks, as on the CPU.
    cached:      whether the tower's features come from the disk.
    llm_bits:    of a number of the frozen LLM under adapters.
    """

    size: int = 2
    dealt: int = 1
    reshard: bool = True
    recompute: int = 0
    accumulated: bool = False
    masked: bool = False
    cached: bool = False
    llm_bits: int = 16


@dataclass(frozen=True, slots=True)
class Micro:
    """A micro-batch on one device: rows of `length` positions with `supervised` labels and `images` in all."""

    rows: int
    length: int
    images: int
    supervised: int

    @property
    def positions(self) -> int:
        """Positions, padding included."""
        return self.rows * self.length


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device at one moment.

    weights:     as they lie between steps; masters of weights that are also held in the forward pass's type included.
    gathered:    dealt weights put together for use, and the buffers of the traffic.
    activations: what the forward pass keeps for the backward pass.
    working:     what comes and goes: gradients of activations, logits of a chunk.
    """

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    gathered: float = 0.0
    activations: float = 0.0
    working: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(float(getattr(self, field.name)) for field in fields(self))


def peak_memory(shape: ModelShape, learning: Learning, holding: Holding, micro: Micro) -> Memory:
    """The moment of a step, after the first one, that needs most."""
    return max(_moments(shape, learning, holding, micro), key=lambda moment: moment.total)


def resting(shape: ModelShape, learning: Learning, holding: Holding) -> dict[str, Memory]:
    """What each component holds between steps: its weights, and the optimizer's moments of those that learn."""
    every, learnt = count_parameters(shape), count_learning(shape, learning)
    own = _FLOAT32 if holding.dealt > 1 or holding.size == _FLOAT32 else holding.size + _FLOAT32
    return {
        name: Memory(
            weights=(_frozen_bytes(name, shape, learning, holding) + own * learnt[name]) / holding.dealt,
            optimizer=_MOMENTS * learnt[name] / holding.dealt,
        )
        for name in every
    }


def by_component(shape: ModelShape, learning: Learning, holding: Holding, micro: Micro) -> dict[str, Memory]:
    """The same with all gradients of a step, and with what the forward pass keeps; the peak is below their sum."""
    learnt, kept = count_learning(shape, learning), _Kept(shape, learning, holding, micro)
    tower = kept.tower(shape.tower.used) if learning.vision else 0.0
    activations = {
        "tower": tower,
        "projector": kept.media - tower,
        "blocks": kept.below(shape.llm.layers) - kept.media + kept.top,
    }
    return {
        name: replace(
            memory,
            gradients=_FLOAT32 * learnt[name] / holding.dealt,
            activations=activations.get(name, 0.0),
        )
        for name, memory in resting(shape, learning, holding).items()
    }


def _frozen_bytes(name: str, shape: ModelShape, learning: Learning, holding: Holding) -> float:
    """Bytes of a component's frozen weights, before they are dealt."""
    count = count_parameters(shape)[name]
    if not learning.rank or name != "blocks":
        return float(count - count_learning(shape, learning)[name]) * holding.size
    matrices = shape.llm.layers * sum(matrix.weights for matrix in shape.llm.matrices)
    # NF4 keeps a float32 scale for every 64 numbers; int8 one for every row, which is next to nothing.
    per_number = holding.size if holding.llm_bits == 16 else holding.llm_bits / 8 + (holding.llm_bits == 4) / 16
    return matrices * per_number + (count - matrices) * holding.size


def _moments(shape: ModelShape, learning: Learning, holding: Holding, micro: Micro) -> Iterator[Memory]:
    """The moments of a step at which memory can be greatest."""
    parts = resting(shape, learning, holding).values()
    rest = Memory(weights=sum(one.weights for one in parts), optimizer=sum(one.optimizer for one in parts))
    learnt = count_learning(shape, learning)
    total = sum(learnt.values())
    # In one process a gradient has the type of the forward pass until it joins the float32 sum.
    own = holding.size if holding.dealt == 1 else _FLOAT32 / holding.dealt
    summed = holding.accumulated and holding.dealt == 1 and holding.size < _FLOAT32
    before = _FLOAT32 * total if summed else own * total * holding.accumulated

    def at(grown: float, gathered: float, activations: float, working: float) -> Memory:
        grown = own * grown if summed or not holding.accumulated else 0.0
        return Memory(rest.weights, before + grown, rest.optimizer, gathered, activations, working)

    kept = _Kept(shape, learning, holding, micro)
    gathered = _Gathered(shape, learning, holding)
    yield at(0, gathered.units(shape.tower.block), kept.shared, kept.tower_forward)
    yield at(0, gathered.units(shape.llm.block), kept.below(shape.llm.layers) + kept.top, kept.loss)
    grown: float = learnt["head"] + (learnt["embeddings"] if shape.tied else 0)
    block = (learnt["blocks"] - shape.final_norm * learning.norms) / shape.llm.layers
    for index in reversed(range(shape.llm.layers)):
        if kept.graph:
            grown += block
            left = (index + 1) / shape.llm.layers
            traffic = gathered.units(shape.llm.block, left) + gathered.reduced(block)
            yield at(grown, traffic, kept.below(index), kept.block_backward(index))
    grown = total - learnt["tower"] - learnt["projector"]
    yield at(
        grown,
        gathered.units(0, 0.0) + gathered.reduced(shape.embedding * learning.vocabulary),
        kept.media + kept.shared,
        kept.embeds,
    )
    if learning.vision:
        for index in reversed(range(shape.tower.used)):
            done = total - learnt["tower"] + (shape.tower.used - index) * shape.tower.block
            traffic = gathered.units(shape.tower.block, 0.0) + gathered.reduced(shape.tower.block)
            yield at(done, traffic, kept.tower(index) + kept.shared, kept.tower_backward(index))
    yield Memory(rest.weights, _FLOAT32 * total / holding.dealt, rest.optimizer, gathered.units(0, 0.0), kept.shared, 0)


class _Gathered:
    """Dealt weights that are whole for a while: what belongs to no unit, and two units, the next on its way."""

    def __init__(self, shape: ModelShape, learning: Learning, holding: Holding) -> None:
        self.holding = holding
        every = count_parameters(shape)
        self.root = every["embeddings"] + every["head"] + shape.final_norm + shape.tower_rest + shape.tower_unused
        self.blocks = shape.llm.layers * shape.llm.block
        self.tower = shape.tower.used * shape.tower.block

    def units(self, unit: int, left: float = 1.0) -> float:
        """The root, and two units; or, where they are kept, the share of all decoder blocks that is `left`."""
        if self.holding.dealt == 1:
            return 0.0
        held = 2 * unit if self.holding.reshard else self.tower + left * self.blocks
        return self.holding.size * (self.root + held)

    def reduced(self, unit: float) -> float:
        """Gradients of a unit before they are summed over all ranks: in the forward pass's type, and as float32."""
        return 0.0 if self.holding.dealt == 1 else (self.holding.size + _FLOAT32) * unit


class _Kept:
    """Bytes of activations of a micro-batch, by how far the backward pass has come."""

    def __init__(self, shape: ModelShape, learning: Learning, holding: Holding, micro: Micro) -> None:
        self.shape, self.learning, self.holding, self.micro = shape, learning, holding, micro
        size = holding.size
        positions, width = micro.positions, shape.llm.width
        # A boolean mask becomes numbers in every block, which keeps them.
        mask = size * micro.rows * micro.length**2 if holding.masked else 0
        self._saved = positions * decoder_saved(shape.llm, learning, size, masked=holding.masked) + mask
        self._input = positions * size * width
        self._working = positions * decoder_working(shape.llm, learning, size)
        self._tower_positions = micro.images * shape.views * shape.tower_tokens
        # What stays for the whole step: pictures as they came, in float32, and the mask.
        seen: float = _FLOAT32 * shape.pixels if not holding.cached else size * shape.patches * shape.tower.width
        self.shared = float(micro.images * seen)
        self.shared += micro.rows * micro.length**2 if holding.masked else 0
        self.top = positions * width * (_FLOAT32 + size * (1 + learning.norms))
        self.embeds = 2 * self._input + size * shape.embedding * learning.vocabulary * (not shape.tied)

    @property
    def graph(self) -> bool:
        """Whether decoder blocks have anything to keep: something learns in them or below them."""
        return self.learning.below_llm or self.learning.llm

    def _recomputed(self, index: int) -> bool:
        return bool(self.holding.recompute) and index % self.holding.recompute == 0

    def _recomputed_below(self, index: int) -> int:
        """How many of the first `index` blocks are recomputed."""
        return math.ceil(index / self.holding.recompute) if self.holding.recompute else 0

    def below(self, index: int) -> float:
        """Kept when the backward pass has reached the blocks before `index`."""
        again = self._recomputed_below(index)
        blocks = again * self._input + (index - again) * self._saved if self.graph else 0
        return blocks + self.media + self.shared

    def block_backward(self, index: int) -> float:
        """Needed on top while the backward pass of a block runs, its own activations included."""
        again = self._input if self._recomputed(index) else 0
        return self._saved + self._working + again

    @property
    def loss(self) -> float:
        """Hidden states of supervised positions, their gradients, the logits of a chunk, and the head's gradient."""
        rows = self.micro.supervised
        hidden = 2 * rows * self.shape.llm.width * self.holding.size
        chunk = min(rows, max(1, _CHUNK_BYTES // (_FLOAT32 * self.shape.vocabulary)))
        # In bfloat16 logits, and the share of a chunk in the head's gradient, also exist in that type.
        rounded = self.holding.size if self.holding.size < _FLOAT32 else 0
        logits = chunk * self.shape.vocabulary * (rounded + _FLOAT32)
        head = self.shape.embedding * self.learning.vocabulary * (rounded + _FLOAT32)
        return hidden + logits + head

    @property
    def media(self) -> float:
        """Kept by projector and tower."""
        projector = 0.0
        vectors = self.micro.images * self.shape.media_tokens
        if self.learning.projector or self.learning.vision:
            hidden = sum(matrix.outputs for matrix in self.shape.projector[:-1])
            projector = self.holding.size * vectors * hidden * (1 + self.learning.projector)
            if self.shape.merges:
                projector += 2 * self.holding.size * vectors * self.shape.projector[0].inputs
        features = self.holding.size * self._tower_positions * self.shape.tower.width * self.learning.projector
        pixels = self.holding.size * self.micro.images * self.shape.pixels * self.learning.vision
        return projector + features + pixels + (self.tower(self.shape.tower.used) if self.learning.vision else 0)

    def tower(self, index: int) -> float:
        """Kept by the tower's blocks before `index`."""
        again = self._recomputed_below(index)
        inputs = self.holding.size * self.shape.tower.width
        kept = again * inputs + (index - again) * tower_saved(self.shape.tower, self.holding.size)
        return self._tower_positions * float(kept)

    def tower_backward(self, index: int) -> float:
        """Needed on top while the backward pass of a tower's block runs."""
        size = self.holding.size
        return self._tower_positions * float(
            tower_saved(self.shape.tower, size) + tower_working(self.shape.tower, size)
        )

    @property
    def tower_forward(self) -> float:
        """Needed by the tower's forward pass when nothing in it learns."""
        if self.holding.cached:
            return 0.0
        stack, size = self.shape.tower, self.holding.size
        pixels = self.holding.size * self.micro.images * self.shape.pixels
        return pixels + self._tower_positions * float(size * (4 * stack.width + 2 * stack.mlp_width))
