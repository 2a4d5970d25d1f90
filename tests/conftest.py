"""What holds for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    """Undo a change of the umask: programs that a test calls in this process keep what they write private."""
    before = os.umask(0)
    os.umask(before)
    yield
    os.umask(before)


@pytest.fixture(autouse=True, scope="module")
def environment() -> Iterator[None]:
    """Fail if a module's tests leave a `POISE_` variable behind, which every later test would see."""
    before = poise_variables()
    yield
    assert poise_variables() == before


def poise_variables() -> dict[str, str]:
    """Return the `POISE_` variables, except what the vllm engine sets in its own process for its children."""
    inherited = "POISE_GENERATION_SERVER_PID"
    return {name: value for name, value in os.environ.items() if name.startswith("POISE_") and name != inherited}
