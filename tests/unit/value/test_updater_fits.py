"""Background fits: when they run, on which labels, and what a failure does. A probe is saved before it answers."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.support.memory_queue import MemoryStream
from tests.unit.value.harness import (
    TIMEOUT_S,
    BlockedFitter,
    FailingFitter,
    Harness,
    MeanFitter,
    PickyFitter,
    always_probe,
    full_disk,
    until,
)

import poise.value.updater
from poise.errors import BackendDown
from poise.value.estimators.probe.model import FittedProbe
from poise.value.estimators.step_probes import VersionedProbe
from poise.value.messages import parse_label
from poise.value.servicer import ValueServicer
from poise_proto.v1 import value_pb2


@pytest.fixture
def start(config) -> Callable[..., Harness]:
    return lambda make_fitter=MeanFitter, **changes: Harness(config(**changes), MemoryStream(), make_fitter)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(poise.value.updater, "READ_WAIT_S", 0.01)


def learn(harness: Harness, make, *steps: int, **options) -> None:
    for step in steps:
        harness.state.learn(make.label(step, **options))


def learn_and_fit(harness: Harness, make, *steps: int, **options) -> None:
    learn(harness, make, *steps, **options)
    harness.updater.request_fits()


def version(harness: Harness, domain: str = "default") -> int:
    probe = harness.state.probes.get(domain)
    return probe.version if probe else 0


async def test_only_a_due_domain_is_fitted(start, make) -> None:
    with start().opened() as harness:
        learn(harness, make, 0, 1, domain="math")
        learn(harness, make, 0, group_id="x", domain="code")
        await harness.run_until(lambda: version(harness, "math") == 1)
        assert version(harness, "code") == 0
        expected = MeanFitter().fit(harness.state.domains["math"].window.groups)
        assert harness.state.probes["math"].probe.bias == expected.bias


async def test_a_restored_state_that_is_due_is_fitted_immediately(start, make) -> None:
    with start().opened() as harness:
        learn(harness, make, 0, 1)
        await harness.updater.save()
    with start().opened() as harness:
        await harness.run_until(lambda: version(harness) == 1)


async def test_labels_that_arrive_during_a_fit_are_in_the_next_one(start, make) -> None:
    fitter = BlockedFitter()
    async with start(lambda: fitter).running() as harness:
        learn_and_fit(harness, make, 0, 1)
        await until(lambda: fitter.num_begun == 1)
        learn_and_fit(harness, make, 2)
        learn_and_fit(harness, make, 3, 4)
        fitter.go.release()
        await until(lambda: version(harness) == 1)
        assert harness.state.probes["default"].num_added == 2
        fitter.go.release()
        await until(lambda: version(harness) == 2)
        assert not harness.state.is_due("default")
    assert fitter.sizes == [2, 5]


async def test_a_fit_is_dropped_if_its_window_was_emptied(start, make) -> None:
    fitter = BlockedFitter()
    async with start(lambda: fitter).running() as harness:
        learn_and_fit(harness, make, 0, 1, width=9)
        await until(lambda: fitter.num_begun == 1)
        for step in range(2, 6):
            label = make.label(step)
            if harness.state.width_vote(label) is None:
                harness.state.learn(label)
        harness.updater.request_fits()
        fitter.go.release()
        await until(lambda: fitter.num_begun == 2)
        assert version(harness) == 0
        fitter.go.release()
        await until(lambda: version(harness) == 1)
    assert fitter.sizes == [2, 3]


async def test_a_step_pinned_during_a_fit_keeps_the_old_probe(start, make) -> None:
    fitter = BlockedFitter()
    async with start(lambda: fitter).running() as harness:
        learn_and_fit(harness, make, 0, 1)
        fitter.go.release()
        await until(lambda: version(harness) == 1)
        learn_and_fit(harness, make, 2)
        await until(lambda: fitter.num_begun == 2)
        assert harness.state.estimate("run", 9, [make.query()])[0].probe_version == 1
        fitter.go.release()
        await until(lambda: version(harness) == 2)
        assert harness.state.estimate("run", 9, [make.query()])[0].probe_version == 1
        assert harness.state.estimate("run", 10, [make.query()])[0].probe_version == 2


async def test_a_domain_keeps_its_own_fitter(start, make) -> None:
    made: list[FailingFitter] = []

    def make_fitter() -> FailingFitter:
        made.append(FailingFitter(0))
        return made[-1]

    async with start(make_fitter).running() as harness:
        for turn in range(1, 4):
            for domain in ("code", "math"):
                learn_and_fit(harness, make, 2 * turn, 2 * turn + 1, group_id=domain, domain=domain)
            await until(lambda turn=turn: version(harness, "code") == version(harness, "math") == turn)
    assert [fitter.num_fits for fitter in made] == [3, 3]


async def test_a_failed_fit_keeps_the_probe_and_waits_for_labels(start, make, caplog) -> None:
    fitter = FailingFitter(1)
    caplog.set_level(logging.ERROR)
    async with start(lambda: fitter).running() as harness:
        harness.state.install("default", VersionedProbe(4, FittedProbe({}, 0.5), 0, 0.0))
        learn_and_fit(harness, make, 0, 1)
        await until(lambda: fitter.num_fits == 1)
        for _ in range(5):  # the same rows would fail again
            harness.updater.request_fits()
            await asyncio.sleep(0.005)
        assert (fitter.num_fits, version(harness)) == (1, 4)
        learn_and_fit(harness, make, 2)
        await until(lambda: version(harness) == 5)
        assert harness.fit_failures() == 1
    assert "'default' could not be fitted" in caplog.text


async def test_a_failing_domain_does_not_delay_others(start, make) -> None:
    async with start(lambda: FailingFitter(2)).running() as harness:
        learn_and_fit(harness, make, 0, 1, domain="a")
        learn_and_fit(harness, make, 0, 1, group_id="b", domain="b")
        await until(lambda: harness.fit_failures("b") == 1)


async def test_a_probe_answers_only_after_it_is_saved(start, make, monkeypatch) -> None:
    monkeypatch.setattr(poise.value.updater, "FIT_RETRY_S", 0.005)
    with start().opened() as harness:
        save, failures = harness.store.save, iter(range(3))

        def full(snapshot):
            if next(failures, None) is not None:
                assert version(harness) == 0
                raise OSError(28, "No space left on device")
            return save(snapshot)

        monkeypatch.setattr(harness.store, "save", full)
        learn(harness, make, 0, 1)
        await harness.run_until(lambda: version(harness) == 1)
        assert next(failures, None) is None
        assert harness.updater.problem == ""


async def test_a_full_disk_is_not_counted_as_a_failed_fit(start, make, monkeypatch) -> None:
    monkeypatch.setattr(poise.value.updater, "FIT_RETRY_S", 0.005)
    async with start().running() as harness:
        with full_disk():
            learn_and_fit(harness, make, 0, 1)
            await until(lambda: "the state cannot be saved" in harness.updater.problem)
            with pytest.raises(OSError, match="disk"):
                await harness.updater.save()
            assert version(harness) == 0
        await until(lambda: version(harness) == 1)
        assert harness.fit_failures() == 0
        await until(lambda: harness.updater.problem == "")


async def test_a_service_that_lost_its_folder_fails(start, make) -> None:
    with start().opened() as harness:
        learn(harness, make, 0, 1)
        await harness.updater.save()
        assert harness.failures == []
        (Path(harness.config.state_dir) / "lock").write_bytes(b"another")
        with pytest.raises(OSError, match="another may have it"):
            await harness.updater.save()
        (reason,) = harness.failures
        assert "another may have it" in reason


async def test_requests_are_answered_during_a_fit_and_a_save(start, make, monkeypatch) -> None:
    """A fit and a save are blocked until the requests are answered: neither blocks the loop or a shared lock."""
    fitter = BlockedFitter()
    async with start(lambda: fitter).running() as harness:
        save, begun, go = harness.store.save, threading.Event(), threading.Event()

        def held(snapshot):
            begun.set()
            assert go.wait(TIMEOUT_S)
            return save(snapshot)

        learn_and_fit(harness, make, 0, 1)
        fitter.go.release()
        await until(lambda: version(harness) == 1)
        monkeypatch.setattr(harness.store, "save", held)
        learn_and_fit(harness, make, 2)
        await until(lambda: fitter.num_begun == 2)
        keeping = asyncio.create_task(harness.updater.save())
        await until(begun.is_set)

        servicer = ValueServicer(harness.config)
        servicer.open(harness.updater)
        for step in range(5):
            group = value_pb2.GroupFeatures(group_id="q", rollouts=make.message(make.label(step)).rollouts)
            request = value_pb2.EstimateBaselinesRequest(run_id="asked", step=step, groups=[group])
            answer = await asyncio.wait_for(servicer.EstimateBaselines(request, None), TIMEOUT_S)
            assert answer.groups[0].probe_version == 1
        assert not keeping.done()
        assert fitter.num_begun == 2
        assert version(harness) == 1

        go.set()
        await keeping
        fitter.go.release()
        await until(lambda: version(harness) == 2)


async def test_a_version_names_one_probe_even_after_a_crash(start, make) -> None:
    with start().opened() as harness:
        learn(harness, make, 0, 1)
        await harness.run_until(lambda: version(harness) == 1)
        (answer,) = harness.state.estimate("run", 9, [make.query("q")])
    with start().opened() as harness:  # nothing was saved after the answer
        learn(harness, make, 2)
        assert version(harness) == answer.probe_version == 1
        await harness.run_until(lambda: version(harness) == 2)


async def test_stopping_waits_for_the_current_fit(start, make) -> None:
    fitter = BlockedFitter()
    with start(lambda: fitter).opened() as harness:
        running = asyncio.create_task(harness.updater.run())
        learn_and_fit(harness, make, 0, 1)
        await until(lambda: fitter.num_begun == 1)
        harness.updater.stop()
        await asyncio.sleep(0.05)
        assert not running.done()
        fitter.go.release()
        await asyncio.wait_for(running, TIMEOUT_S)
        assert version(harness) == 1
    with start().opened() as harness:
        assert version(harness) == 1


async def test_saves_never_overlap(start, make, monkeypatch) -> None:
    with start().opened() as harness:
        save, lock, numbers = harness.store.save, threading.Lock(), []

        def guarded(snapshot):
            assert lock.acquire(blocking=False), "two saves at once"
            try:
                numbers.append(snapshot.num_groups_consumed)
                return save(snapshot)
            finally:
                lock.release()

        monkeypatch.setattr(harness.store, "save", guarded)

        async def learn_and_keep(step: int) -> None:
            learn(harness, make, step)
            await harness.updater.save()

        await asyncio.gather(*(learn_and_keep(step) for step in range(5)))
        assert numbers[-1] == 5


async def test_an_unfit_group_is_dead_lettered_and_the_rest_fitted(start, make, caplog) -> None:
    with start(lambda: PickyFitter(["bad"])).opened() as harness:
        learn(harness, make, 0, 1, 2)
        learn(harness, make, 3, group_id="bad")
        bad = harness.state.domains["default"].window.groups[-1]
        await harness.run_until(lambda: version(harness) == 1)
        (letter,) = await harness.queue.dead_letters(max_entries=9)
        assert "no estimator can be fitted with it" in letter.reason
        again = parse_label(letter.payload, 2**20, always_probe)
        assert (again.step, again.group_id) == (3, "bad")
        np.testing.assert_array_equal(again.features.prompt_hidden, bad.features.prompt_hidden)
        np.testing.assert_array_equal(again.features.entropies, bad.features.entropies)
    assert "Traceback" not in caplog.text
    with start(
        lambda: PickyFitter(["bad"])
    ).opened() as harness:  # it was removed permanently and cannot be learnt again
        groups = harness.state.domains["default"].window.groups
        assert [group.step for group in groups] == [0, 1, 2]
        learn(harness, make, 3, group_id="bad")
        assert harness.state.num_duplicates == 1
        learn(harness, make, 4)
        await harness.run_until(lambda: version(harness) == 2)


async def test_a_group_stays_until_it_is_dead_lettered(start, make, monkeypatch) -> None:
    with start(lambda: PickyFitter(["bad"])).opened() as harness:
        learn(harness, make, 0, 1, 2)
        learn(harness, make, 3, group_id="bad")
        num_tries = 0

        async def down(delivery, reason):
            nonlocal num_tries
            num_tries += 1
            raise BackendDown("Redis is down")

        with monkeypatch.context() as broken:
            broken.setattr(harness.queue, "dead_letter", down)
            await harness.run_until(lambda: num_tries == 1)
        assert len(harness.state.domains["default"].window.groups) == 4


async def test_a_fit_that_always_fails_removes_no_label(start, make) -> None:
    names = [f"g{step}" for step in range(6)]
    with start(lambda: PickyFitter(names)).opened() as harness:
        for step, name in enumerate(names):
            learn(harness, make, step, group_id=name)
        await harness.run_until(lambda: harness.updater.will_not_fit("default"))
        assert len(harness.state.domains["default"].window.groups) == 6
        assert await harness.queue.dead_letters(max_entries=9) == []
