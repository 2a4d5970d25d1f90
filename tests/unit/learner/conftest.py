from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.support.tiny_models import make_tiny_llama
from tests.unit.learner.batches import make_config

from poise.learner.config import LearnerConfig


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
def config(model, tmp_path) -> Callable[..., LearnerConfig]:
    """Settings of a learner with its state beside the test's files."""
    return lambda **changes: make_config(model, changes.pop("state_dir", tmp_path / "state"), **changes)
