"""The stage of a starting service and its duration."""

from __future__ import annotations

import pytest

from poise.errors import BackendDown, Starting
from poise.runtime import startup as module
from poise.runtime.rpc.interceptors import rich_status
from poise.runtime.service import Readiness
from poise.runtime.startup import Startup, without_elapsed
from poise_proto.v1 import errors_pb2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_stage_is_shown_with_its_seconds(clock: list[float]) -> None:
    startup = Startup("starting")
    clock[0] += 3
    startup.begin("loading weights")
    clock[0] += 40.4
    assert str(startup) == "loading weights, 40 s"
    assert str(startup.error()) == "loading weights, 40 s"
    assert str(startup.error("the learner is ")) == "the learner is loading weights, 40 s"


def test_stage_of_another_process_is_shown(clock: list[float]) -> None:
    startup, stages = Startup("starting vLLM"), [""]
    with startup.reported_by(lambda: stages[0]):
        assert startup.stage == "starting vLLM"
        clock[0] += 5
        stages[0] = "loading weights"
        assert str(startup) == "loading weights, 0 s"
        clock[0] += 7
        assert str(startup) == "loading weights, 7 s"
    stages[0] = "ignored"
    startup.begin("preparing weight updates")
    assert startup.stage == "preparing weight updates"


def test_reason_is_constant_during_a_stage() -> None:
    early, late = (Readiness(False, "loading weights", seconds) for seconds in (1.0, 40.0))
    assert early == late
    assert late.text == "loading weights, 40 s"
    assert Readiness(False, "paused").text == "paused"
    assert Readiness(True).text == ""


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("loading weights, 40 s", "loading weights"),
        (
            "generation: loading weights, 40 s; learner: recovering, 3 s",
            "generation: loading weights; learner: recovering",
        ),
        ("nobody answers", "nobody answers"),
        ("waited 5, 6 s in all", "waited 5, 6 s in all"),
    ],
)
def test_seconds_are_removed_from_stages(text: str, stages: str) -> None:
    assert without_elapsed(text) == stages


def test_start_is_distinguished_from_failure_on_the_wire() -> None:
    def is_starting(error: BackendDown) -> bool:
        detail = errors_pb2.PoiseErrorDetail()
        assert rich_status(error).details[0].Unpack(detail)
        assert detail.retryable
        return detail.starting

    assert is_starting(Starting("loading weights, 40 s"))
    assert not is_starting(BackendDown("the engine died"))
