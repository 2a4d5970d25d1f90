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
    """Fail where a module's tests leave an environment variable of ours behind: every later test would see it."""
    before = poise_variables()
    yield
    assert poise_variables() == before


def poise_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("POISE_")}
