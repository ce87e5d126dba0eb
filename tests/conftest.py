"""What every test gets: a seed, one torch thread, NaN in unwritten memory, ranks that end."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests.ranks import close_pool, make_torch_strict

# How long an example takes says something about the machine only.
settings.register_profile("ringctx", deadline=None)
settings.load_profile("ringctx")

# Ranks compare the arguments of every attention call; the processes started here inherit it.
os.environ["RINGCTX_CHECK"] = "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def strict_torch(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    make_torch_strict()
    if request.node.get_closest_marker("gpu"):
        # Some CUDA kernels have no deterministic form.
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def rank_pool() -> Iterator[None]:
    yield
    close_pool()
