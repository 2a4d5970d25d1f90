"""Descriptions of exit statuses."""

from __future__ import annotations

import pytest

from poise.local.processes.process import describe_exit


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0, "exited with status 0"),
        (2, "exited with status 2"),
        (-9, "was killed by SIGKILL"),
        (-11, "was killed by SIGSEGV"),
        (-250, "was killed by signal 250"),
    ],
)
def test_exit_of_a_process_is_described(status: int, text: str) -> None:
    assert describe_exit(status) == text
