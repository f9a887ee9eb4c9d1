"""Weights of unusual shapes, and Triton's interpreter if there is no GPU."""

import os

import pytest
import torch

from vila.kernels.int4 import quantize

# Triton reads this when kernels are defined, so it is set before any of ours is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def make_weight():
    """(outputs, inputs, group size, ...) to a random weight in 4 bits."""

    def make(num_outputs, num_inputs, group_size, *, seed=0, **how):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(num_outputs, num_inputs, generator=generator) * 0.02
        return quantize(values, group_size, **how)

    return make
