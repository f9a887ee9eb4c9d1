"""Model FLOPs of a training step, and the trainable parts of a model.

A matmul costs 2 FLOPs per weight and token in the forward pass, 2 more in the backward pass if anything before it is
trainable (gradient of its input), and 2 more if the weight is trainable. Attention is counted per pair of tokens that
attend to each other. Norms, activations, softmax and the optimizer (below 1 %) are not counted, nor is recomputation of
activations: FLOPs / time / peak is the MFU of PaLM (arXiv 2204.02311, appendix B), not the HFU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from vila.config.schema import Stage
from vila.plan.model_shape import Matrix, ModelShape, Stack, count_parameters


@dataclass(frozen=True, slots=True)
class TrainableParts:
    """Trainable parts of a model.

    parts:   modules of a decoder block that are trainable; empty: the whole LLM.
    rank:    rank of LoRA adapters, trained instead of the LLM; 0: none.
    targets: names of the Linear layers with an adapter; empty: all.
    """

    vision: bool = False
    projector: bool = False
    llm: bool = False
    embeddings: bool = True
    parts: tuple[str, ...] = ()
    rank: int = 0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0

    @staticmethod
    def of(stage: Stage) -> TrainableParts:
        """Return the trainable parts of a recipe's stage."""
        return TrainableParts(
            "vision" in stage.tune,
            "projector" in stage.tune,
            "llm" in stage.tune,
            stage.tune_embeddings,
            stage.llm_parts,
            stage.lora.rank,
            stage.lora.targets,
            stage.lora.dropout,
        )

    def is_trained(self, name: str) -> bool:
        """Return whether the weight of a Linear of a decoder block is trainable."""
        return self.llm and not self.rank and (not self.parts or bool(set(name.split(".")) & set(self.parts)))

    def has_adapter(self, name: str) -> bool:
        """Return whether a Linear of a decoder block has a LoRA adapter."""
        return self.llm and self.rank > 0 and (not self.targets or name.rpartition(".")[2] in self.targets)

    @property
    def trains_vocabulary(self) -> bool:
        """Whether token embeddings and LM head are trainable."""
        return self.llm and not self.rank and self.embeddings and not self.parts

    @property
    def trains_norms(self) -> bool:
        """Whether the norms of decoder blocks are trainable."""
        return self.llm and not self.rank and not self.parts

    @property
    def below_llm(self) -> bool:
        """Whether anything before the first decoder block is trainable."""
        return self.vision or self.projector or self.trains_vocabulary


def count_trainable(shape: ModelShape, trainable: TrainableParts) -> dict[str, int]:
    """Return the number of trainable parameters by component; those of adapters are part of `blocks`."""
    blocks = sum(m.weights for m in shape.llm.matrices if trainable.is_trained(m.name))
    blocks += sum(trainable.rank * (m.inputs + m.outputs) for m in shape.llm.matrices if trainable.has_adapter(m.name))
    if trainable.trains_norms:
        blocks += shape.llm.small
    every = count_parameters(shape)
    return {
        "tower": every["tower"] * trainable.vision,
        "projector": every["projector"] * trainable.projector,
        "embeddings": every["embeddings"] * trainable.trains_vocabulary,
        "blocks": blocks * shape.llm.layers + shape.final_norm * trainable.trains_norms,
        "head": every["head"] * trainable.trains_vocabulary,
    }


_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of one step by component; `attention` is the sum of tower and LLM."""

    tower: float
    projector: float
    blocks: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """Sum of all components."""
        return self.tower + self.projector + self.blocks + self.attention + self.head


def causal_pairs(lengths: Iterable[int]) -> int:
    """Return the number of (query, key) pairs of causal attention over samples of these lengths."""
    return sum(length * (length + 1) // 2 for length in lengths)


def step_flops(
    shape: ModelShape, trainable: TrainableParts, *, tokens: float, pairs: float, supervised: float, images: float
) -> Flops:
    """Return the model FLOPs of forward and backward pass, summed over all ranks and micro-batches of a step.

    tokens:     tokens of the LLM, image tokens included, padding not included.
    pairs:      attention pairs: `causal_pairs` of the lengths of the samples; with shared prefixes, the sum of
                (position + 1) over all tokens.
    supervised: tokens with a label, the only ones whose logits are computed.
    images:     images encoded by the tower; 0 if features are cached.
    """
    views = images * shape.views
    first, after, first_attention = _block(shape.llm, trainable, trainable.below_llm)
    rest, _, rest_attention = _block(shape.llm, trainable, after)
    layers = shape.llm.layers
    tower_factor = 3 if trainable.vision else 1
    tower_weights = sum(matrix.weights for matrix in shape.tower.matrices)
    llm_attention = _attention(shape.llm, pairs)
    return Flops(
        tower=2 * views * shape.patch_positions * shape.patch_weights * (1 + trainable.vision)
        + 2 * views * shape.tower_tokens * tower_weights * shape.tower.used * tower_factor,
        projector=images * shape.media_tokens * _projector(shape.projector, trainable),
        blocks=tokens * (first + (layers - 1) * rest),
        attention=_attention(shape.tower, views * shape.tower_tokens**2) * shape.tower.used * tower_factor
        + llm_attention * (first_attention + (layers - 1) * rest_attention),
        head=2 * supervised * shape.embedding * (1 + after + trainable.trains_vocabulary),
    )


def _attention(stack: Stack, pairs: float) -> float:
    """Return the forward FLOPs of attention in one block: scores and weighted sum of values."""
    return 4 * pairs * stack.heads * stack.head_width


def _block(stack: Stack, trainable: TrainableParts, below: bool) -> tuple[float, bool, int]:
    """Return the FLOPs of one decoder block per token (without attention), whether its output needs a gradient, and the
    cost of attention as a multiple of its forward pass (1 or 3). below: whether its input needs a gradient."""
    below = below or trainable.trains_norms
    total, attention = 0.0, 1
    for _, group in groupby(stack.matrices, key=_input_of):
        matrices = tuple(group)
        for matrix in matrices:
            total += 2 * matrix.weights * (1 + below + trainable.is_trained(matrix.name))
            if trainable.has_adapter(matrix.name):
                # Matmuls with A, whose input needs a gradient if that of the Linear does, and with B.
                total += 2 * trainable.rank * (matrix.inputs * (2 + below) + matrix.outputs * 3)
        below = below or any(trainable.is_trained(m.name) or trainable.has_adapter(m.name) for m in matrices)
        if _input_of(matrices[0]) == _SAME_INPUT[0]:
            attention = 3 if below else 1
    return total, below, attention


def _projector(matrices: Sequence[Matrix], trainable: TrainableParts) -> float:
    """Return the FLOPs of the projector per image token."""
    below, total = trainable.vision, 0.0
    for matrix in matrices:
        total += 2 * matrix.weights * (1 + below + trainable.projector)
        below = below or trainable.projector
    return total


def _input_of(matrix: Matrix) -> tuple[str, ...]:
    """Return a key that is equal for Linear layers with the same input."""
    last = matrix.name.rpartition(".")[2]
    return next((group for group in _SAME_INPUT if last in group), (last,))
