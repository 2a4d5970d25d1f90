"""A clock that tests control."""

import pytest

from poise_client._transport.retry import Clock


class FakeTime:
    """A clock that advances only in `sleep`; its random numbers are always the maximum."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.slept_s: list[float] = []
        self.clock = Clock(now=lambda: self.now_s, sleep=self._sleep, draw=lambda low, high: high)

    async def _sleep(self, delay_s: float) -> None:
        self.slept_s.append(delay_s)
        self.now_s += delay_s


@pytest.fixture
def time() -> FakeTime:
    return FakeTime()
