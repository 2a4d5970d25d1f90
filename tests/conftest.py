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
