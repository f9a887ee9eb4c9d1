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

from vila.plan.learning import Learning
from vila.plan.shape import Matrix, ModelShape, Stack

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
