"""How pytest-xdist spreads tests over worker processes: how many workers, which tests stay together, which start first.

A file stays in one worker, so its module-scoped fixtures are made once. Files that need the same scarce thing form one
group, which one worker runs from end to end.
"""

from __future__ import annotations

import os

import psutil
import pytest
from xdist.scheduler import LoadScopeScheduling

WORKER_BYTES = 4 * 2**30
"""Memory of one worker with the services that its test has started; vLLM takes the most."""

GROUPS = {
    **dict.fromkeys(
        (
            "tests/contract/test_engine_adapters.py",
            "tests/contract/test_engines.py",
            "tests/contract/test_vllm_engine.py",
            "tests/contract/test_vllm_weight_loader.py",
            "tests/contract/test_weights_over_groups.py",
            "tests/e2e/test_vllm_run.py",
        ),
        "vllm",  # one engine at a time: each takes 3 GiB
    ),
    **dict.fromkeys(
        (
            "tests/e2e/test_check.py",
            "tests/e2e/test_exact_step.py",
            "tests/e2e/test_private_run.py",
            "tests/e2e/test_third_party_client.py",
        ),
        "tiny_services",  # a session-scoped fixture
    ),
}

FIRST = ("tests/contract", "tests/e2e", "tests/integration", "tests/chart", "tests/fuzz", "tests/unit")
"""Folders in the order in which they start. Long files come first, so that no worker ends long after the others."""


def num_workers(*, has_slow_tests: bool) -> int:
    """Return how many workers this machine's cores and free memory can feed.

    Slow tests get more workers than cores, because they wait: for timeouts, and for processes that start.
    """
    num_cores = len(os.sched_getaffinity(0))
    by_cores = num_cores + (num_cores + 1) // 2 if has_slow_tests else num_cores
    return max(1, min(by_cores, psutil.virtual_memory().available // WORKER_BYTES))


def start_order(path: str) -> int:
    """Return the rank of a test file; lower ranks start earlier."""
    ranks = [rank for rank, folder in enumerate(FIRST) if path.startswith(f"{folder}/")]
    return ranks[0] if ranks else len(FIRST)


class FileScheduler(LoadScopeScheduling):  # type: ignore[misc]
    """Give each worker whole files, or whole groups of files, in the order of the collection."""

    def __init__(self, config: pytest.Config, log: object) -> None:
        config.option.loadscopereorder = False  # the default starts files with many tests first, not long ones
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:  # the hook of pytest-xdist for this
        path = nodeid.partition("::")[0]
        return GROUPS.get(path, path)
