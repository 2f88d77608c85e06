"""For all tests: one thread a process (the models are tiny, and `pytest -n` runs several), and a clean Dynamo."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def dynamo():
    """Dynamo without memory of earlier tests, its counters at zero before and after."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
