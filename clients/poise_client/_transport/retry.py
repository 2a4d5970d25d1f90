"""Retries within one deadline, with exponential backoff and jitter. Every RPC of `poise.v1` is idempotent."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from poise_client.errors import DeadlineExceededError, PoiseClientError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Limits of retries after retryable errors, within the deadline of the call."""

    initial_backoff_s: float = 0.1
    """Maximum wait before the second attempt. It doubles with each attempt."""
    max_backoff_s: float = 5.0
    """Maximum wait between attempts, unless the service asks for a longer one."""
    max_attempts: int | None = None
    """Maximum number of attempts without progress. None retries until the deadline; 1 never retries."""

    def __post_init__(self) -> None:
        if not 0 < self.initial_backoff_s <= self.max_backoff_s:
            raise ValueError(
                f"initial_backoff_s is {self.initial_backoff_s}; required: above 0, and at most max_backoff_s, "
                f"{self.max_backoff_s}"
            )
        if self.max_attempts is not None and self.max_attempts < 1:
            raise ValueError(
                f"max_attempts is {self.max_attempts}; required: at least 1, or None to retry until the deadline"
            )


@dataclass(frozen=True, slots=True)
class Clock:
    """Time and random numbers, which tests replace."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    draw: Callable[[float, float], float] = random.uniform
    """Returns a number between two bounds."""


class Attempts:
    """The attempts of one call.

    attempts = Attempts(policy, timeout_s, clock)
    while True:
        try:
            return await attempt(attempts.remaining_s())
        except PoiseClientError as error:
            await attempts.wait_after(error)  # raises the final error
    """

    def __init__(self, policy: RetryPolicy, timeout_s: float, clock: Clock) -> None:
        self._policy = policy
        self._clock = clock
        self._started_s = clock.now()
        self._timeout_s = timeout_s
        self._num_attempts = 0
        self._num_without_progress = 0
        self._last: PoiseClientError | None = None

    def remaining_s(self) -> float:
        """Return the seconds left until the deadline; never negative."""
        return max(0.0, self._timeout_s - self._elapsed_s())

    def progressed(self) -> None:
        """Record progress, which resets the backoff and the count of attempts."""
        self._num_without_progress = 0

    async def wait_after(self, error: PoiseClientError) -> None:
        """Wait until the next attempt is due. Raise `error`, with the number of attempts, if there is none."""
        self._num_attempts += 1
        self._num_without_progress += 1
        error.attempts, error.elapsed_s = self._num_attempts, self._elapsed_s()
        if isinstance(error, DeadlineExceededError):
            error.message = f"no answer within {self._timeout_s:g} s"
            if self._last is not None:
                error.message += f"; the previous attempt failed with: {self._last.message}"
        delay_s = self._delay_s(error)
        exhausted = self._policy.max_attempts is not None and self._num_without_progress >= self._policy.max_attempts
        if not error.retryable or exhausted or delay_s >= self.remaining_s():
            raise error
        self._last = error
        await self._clock.sleep(delay_s)

    def _delay_s(self, error: PoiseClientError) -> float:
        doublings = min(max(0, self._num_without_progress - 1), 30)
        longest_s = min(self._policy.max_backoff_s, self._policy.initial_backoff_s * 2**doublings)
        backoff_s = self._clock.draw(longest_s / 2, longest_s)
        if error.retry_after_s is None:
            return backoff_s
        return error.retry_after_s + backoff_s  # jitter, so that callers do not all retry at once

    def _elapsed_s(self) -> float:
        return self._clock.now() - self._started_s
