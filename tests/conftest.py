"""Settings and checks that every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.distribution import FileScheduler

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tiny models only lose time on more threads


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    """Restore the umask, which programs change when a test calls them in this process."""
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order tests for parallel workers; a run in one process keeps the order of its arguments."""
    if config.getoption("dist", "no") != "no" or hasattr(config, "workerinput"):
        from tests.support.distribution import start_order

        items.sort(key=lambda item: start_order(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of workers for `-n auto`."""
    from tests.support.distribution import num_workers

    return num_workers(has_slow_tests=config.option.markexpr != "not slow")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> FileScheduler:
    """Keep the tests of a file in one worker."""
    from tests.support.distribution import FileScheduler

    return FileScheduler(config, log)
