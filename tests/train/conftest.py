"""Training is compared to the last bit, between this process and ranks that have one thread each."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Sums over several threads differ in the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
