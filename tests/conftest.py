"""Fixtures for all tests: pools of ranks that are started once."""

from collections.abc import Iterator

import pytest
import torch
from ranks import Ranks, pool

torch.set_num_threads(1)  # tiny shapes: more threads only wait for each other


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Takes back the threads of a test that trains or generates in the test process."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks1() -> Iterator[Ranks]:
    """One rank in a gloo group of its own: the reference."""
    yield pool(1)
    pool(1).close()


@pytest.fixture(scope="session")
def ranks2() -> Iterator[Ranks]:
    """Two ranks in one gloo group."""
    yield pool(2)
    pool(2).close()


@pytest.fixture(scope="session")
def ranks4() -> Iterator[Ranks]:
    """Four ranks in one gloo group."""
    yield pool(4)
    pool(4).close()


@pytest.fixture(scope="session")
def ranks8() -> Iterator[Ranks]:
    """Eight ranks in one gloo group."""
    yield pool(8)
    pool(8).close()
