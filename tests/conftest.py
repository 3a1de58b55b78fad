"""Every test runs on one thread, from one seed, with an empty parameter store."""

from collections.abc import Iterator

import pyro
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_pyro() -> Iterator[None]:
    """Seed the generators and clear Pyro's global parameter store around each test."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
