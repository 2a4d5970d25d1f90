import pytest

from poise_client._transport.retry import Attempts, RetryPolicy
from poise_client.errors import BusyError, DeadlineExceededError, InvalidRequestError, UnavailableError


def unavailable(retry_after_s=None):
    return UnavailableError("nobody there", retryable=True, retry_after_s=retry_after_s)


async def test_waits_double_up_to_the_maximum(time):
    attempts = Attempts(RetryPolicy(initial_backoff_s=1, max_backoff_s=5), 100, time.clock)
    for _ in range(5):
        await attempts.wait_after(unavailable())
    assert time.slept_s == [1, 2, 4, 5, 5]


async def test_waits_are_drawn_from_the_upper_half(time):
    drawn = []
    clock = type(time.clock)(time.clock.now, time.clock.sleep, lambda low, high: drawn.append((low, high)) or low)
    attempts = Attempts(RetryPolicy(initial_backoff_s=1), 100, clock)
    await attempts.wait_after(unavailable())
    assert drawn == [(0.5, 1)]
    assert time.slept_s == [0.5]


async def test_retry_after_is_obeyed_with_jitter(time):
    attempts = Attempts(RetryPolicy(initial_backoff_s=0.5), 100, time.clock)
    await attempts.wait_after(BusyError("busy", retryable=True, retry_after_s=7))
    assert time.slept_s == [7.5]


async def test_permanent_errors_are_raised_at_once(time):
    error = InvalidRequestError("no")
    with pytest.raises(InvalidRequestError) as caught:
        await Attempts(RetryPolicy(), 100, time.clock).wait_after(error)
    assert caught.value is error
    assert time.slept_s == []
    assert error.attempts == 1


async def test_no_wait_exceeds_the_deadline(time):
    attempts = Attempts(RetryPolicy(initial_backoff_s=4, max_backoff_s=4), 10, time.clock)
    await attempts.wait_after(unavailable())
    await attempts.wait_after(unavailable())
    assert attempts.remaining_s() == 2
    with pytest.raises(UnavailableError) as caught:
        await attempts.wait_after(unavailable())
    assert (caught.value.attempts, caught.value.elapsed_s) == (3, 8)
    assert time.slept_s == [4, 4]


async def test_a_retry_after_beyond_the_deadline_raises(time):
    with pytest.raises(UnavailableError):
        await Attempts(RetryPolicy(), 10, time.clock).wait_after(unavailable(retry_after_s=10))
    assert time.slept_s == []


async def test_attempts_are_limited_by_the_policy(time):
    attempts = Attempts(RetryPolicy(max_attempts=2), 100, time.clock)
    await attempts.wait_after(unavailable())
    with pytest.raises(UnavailableError):
        await attempts.wait_after(unavailable())
    with pytest.raises(UnavailableError):
        await Attempts(RetryPolicy(max_attempts=1), 100, time.clock).wait_after(unavailable())


async def test_progress_resets_backoff_and_attempts(time):
    attempts = Attempts(RetryPolicy(initial_backoff_s=1, max_attempts=3), 100, time.clock)
    for _ in range(2):
        await attempts.wait_after(unavailable())
    attempts.progressed()
    error = unavailable()
    await attempts.wait_after(error)
    assert time.slept_s == [1, 2, 1]
    assert error.attempts == 3  # all are still counted


async def test_a_deadline_error_has_the_previous_error(time):
    attempts = Attempts(RetryPolicy(), 10, time.clock)
    await attempts.wait_after(unavailable())
    with pytest.raises(DeadlineExceededError, match=r"no answer within 10 s.*nobody there"):
        await attempts.wait_after(DeadlineExceededError("deadline"))


async def test_the_time_left_is_never_negative(time):
    attempts = Attempts(RetryPolicy(), 10, time.clock)
    time.now_s += 11
    assert attempts.remaining_s() == 0


@pytest.mark.parametrize(
    "arguments",
    [{"initial_backoff_s": 0}, {"initial_backoff_s": 6}, {"max_backoff_s": 0.01}, {"max_attempts": 0}],
)
def test_an_invalid_policy_is_rejected(arguments):
    with pytest.raises(ValueError, match="required"):
        RetryPolicy(**arguments)
