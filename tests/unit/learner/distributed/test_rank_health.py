"""Heartbeats between ranks, here threads of one process, over a real store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from poise.learner.distributed import rank_health
from poise.learner.distributed.rank_health import RankEvents, RankHealth, RankLost

TIMEOUT_S = 2.0
PATIENT_S = 60.0
"""For tests where nobody is silent, only slow."""


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The exit statuses of ranks that exited."""
    others, statuses = set(threading.enumerate()), list[int]()
    monkeypatch.setattr(rank_health.os, "_exit", statuses.append)
    monkeypatch.setattr(rank_health.os, "kill", lambda pid, number: None)  # all ranks are this process
    monkeypatch.setattr(rank_health.logging, "shutdown", lambda: None)
    monkeypatch.setattr(rank_health, "_GRACE_S", 0.01)
    monkeypatch.setattr(rank_health, "_BEAT_EVERY_S", 0.05)
    yield statuses
    for thread in set(threading.enumerate()) - others:  # one that exits later would end this process
        thread.join(PATIENT_S)


@pytest.fixture
def meet(exits: list[int]) -> Iterator[Callable[..., list[RankHealth]]]:
    """Makes ranks that have joined each other."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    made: list[RankHealth] = []

    def connect(rank: int, size: int, timeout_s: float = TIMEOUT_S) -> RankHealth:
        client = TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=5))
        made.append(RankHealth(client, rank, size, timeout_s))
        return made[-1]

    def make(size: int, timeout_s: float = TIMEOUT_S) -> list[RankHealth]:
        processes = [connect(rank, size, timeout_s) for rank in range(size)]
        threads = [threading.Thread(target=process.join, args=(30,)) for process in processes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return processes

    make.connect = connect  # type: ignore[attr-defined]
    yield make
    for process in made:
        process.stop()


class Heard:
    """The events that rank 0 received."""

    def __init__(self, process: RankHealth) -> None:
        self.lost: list[RankLost] = []
        self.leaving: list[str] = []
        self.gave_up: list[RankLost] = []
        process.listen(RankEvents(self.lost.append, self.leaving.append, self.gave_up.append))


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_rank_without_heartbeat_is_lost(meet: Callable[..., list[RankHealth]], exits: list[int]) -> None:
    first, second, _ = meet(3)
    heard = Heard(first)

    second.stop()

    wait_until(lambda: heard.gave_up)
    assert "ranks 1 of 3 sent no heartbeat for 2 s" in str(heard.lost[0])
    assert not heard.lost[0].in_training
    wait_until(lambda: len(exits) == 2)
    assert exits == [1, 1], "ranks 0 and 2 exit"


def test_losing_rank_0_ends_all_ranks(meet: Callable[..., list[RankHealth]], exits: list[int]) -> None:
    first, *_ = meet(3)

    first.stop()

    wait_until(lambda: len(exits) == 2)


def test_hanging_event_loop_is_a_loss(meet: Callable[..., list[RankHealth]], exits: list[int]) -> None:
    first, _ = meet(2)
    heard = Heard(first)

    first.touch()

    wait_until(lambda: heard.lost)
    assert "the event loop of rank 0 has been hanging" in str(heard.lost[0])
    wait_until(lambda: len(exits) == 2)


def test_failed_rank_sends_its_reason_to_all(meet: Callable[..., list[RankHealth]], exits: list[int]) -> None:
    first, second, third = meet(3, PATIENT_S)
    heard = Heard(first)

    second.fail("rank 1 failed: out of memory", in_training=True)
    third.fail("connection closed by peer")

    wait_until(lambda: heard.gave_up)
    assert str(heard.lost[0]) == "rank 1 failed: out of memory"
    assert heard.lost[0].in_training


def test_request_to_exit_reaches_rank_0_once(meet: Callable[..., list[RankHealth]], exits: list[int]) -> None:
    first, second = meet(2, PATIENT_S)
    heard = Heard(first)

    second.leave()

    wait_until(lambda: heard.leaving)
    time.sleep(0.3)
    assert heard.leaving == ["a rank of the learner received a stop signal"]
    assert not exits


def test_restarted_rank_ends_the_running_group(
    meet: Callable[..., list[RankHealth]], exits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    meet(2)
    again = meet.connect(1, 2)  # type: ignore[attr-defined]

    with pytest.raises(RankLost, match="rank 1 was restarted while the others ran"):
        again.join(30)

    wait_until(lambda: len(exits) == 2)


def test_missing_ranks_are_named(meet: Callable[..., list[RankHealth]]) -> None:
    alone = meet.connect(0, 3)  # type: ignore[attr-defined]

    with pytest.raises(RankLost, match=r"ranks 1, 2 of 3 did not join within 0 s"):
        alone.join(0.2)


def test_exception_with_all_ranks_alive_is_unchanged(meet: Callable[..., list[RankHealth]], exits: list[int]) -> None:
    first, _ = meet(2)
    error = RuntimeError("out of memory")

    explained = first.explain(error)

    assert explained is error


def test_exception_after_a_loss_names_the_lost_rank(meet: Callable[..., list[RankHealth]], exits: list[int]) -> None:
    first, second = meet(2)

    second.stop()
    explained = first.explain(RuntimeError("Connection closed by peer"))

    assert isinstance(explained, RankLost)
    assert "1 of 2" in str(explained)
