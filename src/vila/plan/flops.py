"""Model FLOPs of a step: the arithmetic that the mathematics asks for, whatever is computed twice to save memory.

A product with a matrix costs 2 operations for every weight and position forward; 2 more in the backward pass where
something below it learns (the gradient of its input), and 2 more where it learns itself. Attention is counted from the
pairs of positions that see each other. Norms, activations, softmax and the optimizer are left out: below one per cent.
Recomputing activations is left out on purpose, so that dividing by the peak gives the MFU, not the HFU, of PaLM
(arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from vila.config.schema import Stage
from vila.plan.model_shape import Matrix, ModelShape, Stack, count_parameters

# --- learning
# Which weights of a model learn, as plain facts, and how many they are.


@dataclass(frozen=True, slots=True)
class Learning:
    """Which weights learn.

    parts:   names that a learning weight of the LLM has on its path; empty: all of it.
    rank:    of low-rank adapters, which then learn in place of the LLM; `targets` name their Linears, empty: all.
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
    def of(stage: Stage) -> Learning:
        """What a recipe's stage says."""
        return Learning(
            "vision" in stage.tune,
            "projector" in stage.tune,
            "llm" in stage.tune,
            stage.tune_embeddings,
            stage.llm_parts,
            stage.lora.rank,
            stage.lora.targets,
            stage.lora.dropout,
        )

    def matrix(self, name: str) -> bool:
        """Whether a Linear of a decoder block learns itself."""
        return self.llm and not self.rank and (not self.parts or bool(set(name.split(".")) & set(self.parts)))

    def adapter(self, name: str) -> bool:
        """Whether a Linear of a decoder block has an adapter, which learns."""
        return self.llm and self.rank > 0 and (not self.targets or name.rpartition(".")[2] in self.targets)

    @property
    def vocabulary(self) -> bool:
        """Whether embeddings and head learn."""
        return self.llm and not self.rank and self.embeddings and not self.parts

    @property
    def norms(self) -> bool:
        """Whether the norms of decoder blocks learn."""
        return self.llm and not self.rank and not self.parts

    @property
    def below_llm(self) -> bool:
        """Whether anything before the first decoder block learns."""
        return self.vision or self.projector or self.vocabulary


def count_learning(shape: ModelShape, learning: Learning) -> dict[str, int]:
    """Parameters that learn, by component; adapters count among `blocks`."""
    blocks = sum(m.weights for m in shape.llm.matrices if learning.matrix(m.name))
    blocks += sum(learning.rank * (m.inputs + m.outputs) for m in shape.llm.matrices if learning.adapter(m.name))
    if learning.norms:
        blocks += shape.llm.small
    every = count_parameters(shape)
    return {
        "tower": every["tower"] * learning.vision,
        "projector": every["projector"] * learning.projector,
        "embeddings": every["embeddings"] * learning.vocabulary,
        "blocks": blocks * shape.llm.layers + shape.final_norm * learning.norms,
        "head": every["head"] * learning.vocabulary,
    }


_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations of one step by component; `attention` is that of tower and LLM together."""

    tower: float
    projector: float
    blocks: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.tower + self.projector + self.blocks + self.attention + self.head


def causal_pairs(lengths: Iterable[int]) -> int:
    """Pairs of positions, the later of which sees the earlier or itself, over samples of these lengths."""
    return sum(length * (length + 1) // 2 for length in lengths)


def step_flops(
    shape: ModelShape, learning: Learning, *, tokens: float, pairs: float, supervised: float, images: float
) -> Flops:
    """Model FLOPs of forward and backward pass, summed over all ranks and micro-batches of a step.

    tokens:     real positions of the LLM, image tokens included and padding not.
    pairs:      `causal_pairs` of the samples' lengths, which do not see each other in a row; with shared prefixes the
                sum of (position + 1) over real tokens, which is the same where there are none.
    supervised: positions whose logits are computed; ours are the only ones that have a label.
    images:     pictures given to the tower; 0 where their features come from a cache.
    """
    views = images * shape.views
    first, after, first_attention = _block(shape.llm, learning, learning.below_llm)
    rest, _, rest_attention = _block(shape.llm, learning, after)
    layers = shape.llm.layers
    tower_factor = 3 if learning.vision else 1
    tower_weights = sum(matrix.weights for matrix in shape.tower.matrices)
    llm_attention = _attention(shape.llm, pairs)
    return Flops(
        tower=2 * views * shape.patch_positions * shape.patch_weights * (1 + learning.vision)
        + 2 * views * shape.tower_tokens * tower_weights * shape.tower.used * tower_factor,
        projector=images * shape.media_tokens * _projector(shape.projector, learning),
        blocks=tokens * (first + (layers - 1) * rest),
        attention=_attention(shape.tower, views * shape.tower_tokens**2) * shape.tower.used * tower_factor
        + llm_attention * (first_attention + (layers - 1) * rest_attention),
        head=2 * supervised * shape.embedding * (1 + after + learning.vocabulary),
    )


def _attention(stack: Stack, pairs: float) -> float:
    """Forward operations of one block: scores, and their product with the values."""
    return 4 * pairs * stack.heads * stack.head_width


def _block(stack: Stack, learning: Learning, below: bool) -> tuple[float, bool, int]:
    """Operations of one decoder block for each token; whether something learns up to its output; and how many times the
    attention's forward cost its forward and backward pass take together (1 or 3)."""
    below = below or learning.norms
    total, attention = 0.0, 1
    for _, group in groupby(stack.matrices, key=_input_of):
        matrices = tuple(group)
        for matrix in matrices:
            total += 2 * matrix.weights * (1 + below + learning.matrix(matrix.name))
            if learning.adapter(matrix.name):
                # Two small products: A, whose input needs a gradient if the Linear's does, and B, on top of A.
                total += 2 * learning.rank * (matrix.inputs * (2 + below) + matrix.outputs * 3)
        below = below or any(learning.matrix(m.name) or learning.adapter(m.name) for m in matrices)
        if _input_of(matrices[0]) == _SAME_INPUT[0]:
            attention = 3 if below else 1
    return total, below, attention


def _projector(matrices: Sequence[Matrix], learning: Learning) -> float:
    """Operations for each vector that the projector makes."""
    below, total = learning.vision, 0.0
    for matrix in matrices:
        total += 2 * matrix.weights * (1 + below + learning.projector)
        below = below or learning.projector
    return total


def _input_of(matrix: Matrix) -> tuple[str, ...]:
    """What Linears that read the same input have in common."""
    last = matrix.name.rpartition(".")[2]
    return next((group for group in _SAME_INPUT if last in group), (last,))
