"""The search on a GPU gives the same result as on the CPU."""

import pytest
import torch

from tests.quant.models import loud, random_rows
from vila.quant.awq_search import search_model
from vila.quant.quant_config import QuantConfig

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("moved", [False, True])
def test_a_search_on_a_gpu_is_that_on_the_cpu(moved):
    """Also when only the block that is searched is on the GPU, and the model stays where it is."""
    model, _ = loud(layers=2, num_key_value_heads=4)
    here = search_model(model, random_rows(), QuantConfig(group_size=16, dtype=torch.float64))
    device = torch.device("cuda")
    there = search_model(
        model.to(device) if moved else model,
        random_rows(),
        QuantConfig(group_size=16, dtype=torch.float64, device=device),
    )
    for one, other in zip(here.scales, there.scales, strict=True):
        assert one.metadata["ratio"] == other.metadata["ratio"]
        assert other.metadata["losses"] == pytest.approx(one.metadata["losses"], rel=1e-4)
