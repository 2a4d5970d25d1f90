from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.integration.learner.replicas import Replica
from tests.support.tiny_models import make_tiny_llama


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def replica() -> AsyncIterator[Callable[[], Awaitable[Replica]]]:
    """Starts replicas."""
    started: list[Replica] = []

    async def start() -> Replica:
        started.append(await Replica().start())
        return started[-1]

    yield start
    for one in started:
        one.release.set()
        await one.stop()
