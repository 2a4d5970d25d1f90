"""Repeated messages become one line a minute, with a count."""

from __future__ import annotations

import logging

import pytest

from poise.runtime.repeat_log import RepeatLog


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_messages_that_differ_in_numbers_are_counted(clock, caplog):
    repeats = RepeatLog(logging.getLogger("test"), clock)
    for number in range(5):
        repeats.log(logging.WARNING, f"entry {number}-0 holds {number * 1.5e30}")
    assert caplog.messages == ["entry 0-0 holds 0.0"]
    clock.now_s = 61.0
    repeats.log(logging.WARNING, "entry 5-0 holds -1.5")
    assert caplog.messages[1:] == ["entry 5-0 holds -1.5 (4 similar messages since the last one)"]


def test_different_messages_are_logged_at_once(clock, caplog):
    repeats = RepeatLog(logging.getLogger("test"), clock)
    for message in ("a", "b", "a", "c"):
        repeats.log(logging.WARNING, message)
    assert caplog.messages == ["a", "b", "c"]


def test_traceback_is_logged_once(clock, caplog):
    repeats = RepeatLog(logging.getLogger("test"), clock)
    for clock.now_s in (0.0, 1.0, 100.0, 200.0):
        repeats.log(logging.ERROR, "failed", ArithmeticError("why"))
    assert [record.exc_info is not None for record in caplog.records] == [True, False, False]


def test_memory_is_bounded(clock, caplog):
    repeats = RepeatLog(logging.getLogger("test"), clock)
    for number in range(1000):
        repeats.log(logging.WARNING, "x" * number)
    repeats.log(logging.WARNING, "")  # forgotten, so it is news
    assert caplog.messages.count("") == 2
