"""Bytes that a transformer block keeps for its backward pass, and those it needs while that runs.

Counted from what the blocks of transformers save, operation by operation, with attention that never holds scores
(FlashAttention, arXiv 2205.14135). All figures are bytes for one position.
"""

from __future__ import annotations

from vila.plan.learning import Learning
from vila.plan.shape import Matrix, Stack

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
