"""Refits beside queries: when, on what, and what a failing one costs. And the keeper, who makes them durable first."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy
from safetensors import SafetensorError
from tests.unit.value.parts import TIMEOUT_S, FailingFitter, HeldFitter, MeanFitter, Parts, PickyFitter, until

import poise.value.updater
from poise.errors import BackendDown
from poise.queue.memory_queue import MemoryStream
from poise.value.messages import parse_label
from poise.value.probe.model import FittedProbe
from poise.value.servicer import ValueServicer
from poise.value.step_probes import VersionedProbe
from poise_proto.v1 import value_pb2


@pytest.fixture
def start(config) -> Callable[..., Parts]:
    return lambda make_fitter=MeanFitter, **changes: Parts(config(**changes), MemoryStream(), make_fitter)


def learn(parts: Parts, make, *steps: int, **options) -> None:
    for step in steps:
        parts.estimator.learn(make.label(step, **options))
    parts.refitter.wake()


def version(parts: Parts, domain: str = "default") -> int:
    probe = parts.estimator.probes.get(domain)
    return probe.version if probe else 0


async def test_a_due_domain_is_fitted_and_one_that_is_not_is_left_alone(start, make) -> None:
    with start().alive() as parts:
        learn(parts, make, 0, 1, domain="math")
        learn(parts, make, 0, group_id="x", domain="code")
        await parts.refit_until(lambda: version(parts, "math") == 1)
        assert version(parts, "code") == 0
        expected = MeanFitter().fit(parts.estimator.domains["math"].window.groups)
        assert parts.estimator.probes["math"].probe.bias == expected.bias


async def test_a_restored_state_that_is_due_is_fitted_at_once(start, make) -> None:
    with start().alive() as parts:
        learn(parts, make, 0, 1)
        await parts.keeper.keep()
    with start().alive() as parts:
        await parts.refit_until(lambda: version(parts) == 1)


async def test_labels_that_come_during_a_fit_are_covered_by_one_more_fit(start, make) -> None:
    fitter = HeldFitter()
    with start(lambda: fitter).alive() as parts:
        running = asyncio.create_task(parts.refitter.run())
        learn(parts, make, 0, 1)
        await until(lambda: fitter.num_begun == 1)
        learn(parts, make, 2)
        learn(parts, make, 3, 4)
        fitter.go.release()
        await until(lambda: version(parts) == 1)
        assert parts.estimator.probes["default"].num_added == 2
        fitter.go.release()
        await until(lambda: version(parts) == 2)
        assert not parts.estimator.is_due("default")
        parts.refitter.stop()
        await running
    assert fitter.sizes == [2, 5]


async def test_a_fit_of_rows_that_another_width_drove_out_meanwhile_is_not_installed(start, make) -> None:
    fitter = HeldFitter()
    with start(lambda: fitter).alive() as parts:
        running = asyncio.create_task(parts.refitter.run())
        learn(parts, make, 0, 1, width=9)
        await until(lambda: fitter.num_begun == 1)
        for step in range(2, 6):
            label = make.label(step)
            if parts.estimator.dissent(label) is None:
                parts.estimator.learn(label)
        parts.refitter.wake()
        fitter.go.release()
        await until(lambda: fitter.num_begun == 2)
        assert version(parts) == 0
        fitter.go.release()
        await until(lambda: version(parts) == 1)
        parts.refitter.stop()
        await running
    assert fitter.sizes == [2, 3]


async def test_a_step_pinned_during_a_fit_keeps_the_probe_before_it(start, make) -> None:
    fitter = HeldFitter()
    with start(lambda: fitter).alive() as parts:
        running = asyncio.create_task(parts.refitter.run())
        learn(parts, make, 0, 1)
        fitter.go.release()
        await until(lambda: version(parts) == 1)
        learn(parts, make, 2)
        await until(lambda: fitter.num_begun == 2)
        assert parts.estimator.estimate("run", 9, [make.question()])[0].probe_version == 1
        fitter.go.release()
        await until(lambda: version(parts) == 2)
        assert parts.estimator.estimate("run", 9, [make.question()])[0].probe_version == 1
        assert parts.estimator.estimate("run", 10, [make.question()])[0].probe_version == 2
        parts.refitter.stop()
        await running


async def test_a_domain_keeps_its_own_fitter(start, make) -> None:
    made: list[FailingFitter] = []

    def make_fitter() -> FailingFitter:
        made.append(FailingFitter(0))
        return made[-1]

    with start(make_fitter).alive() as parts:
        running = asyncio.create_task(parts.refitter.run())
        for turn in range(1, 4):
            for domain in ("code", "math"):
                learn(parts, make, 2 * turn, 2 * turn + 1, group_id=domain, domain=domain)
            await until(lambda turn=turn: version(parts, "code") == version(parts, "math") == turn)
        parts.refitter.stop()
        await running
    assert [fitter.num_fits for fitter in made] == [3, 3]


async def test_a_failed_fit_leaves_the_probe_before_and_is_tried_again_with_new_labels_only(
    start, make, caplog
) -> None:
    fitter = FailingFitter(1)
    with caplog.at_level(logging.ERROR), start(lambda: fitter).alive() as parts:
        running = asyncio.create_task(parts.refitter.run())
        parts.estimator.install("default", VersionedProbe(4, FittedProbe({}, 0.5), 0, 0.0))
        learn(parts, make, 0, 1)
        await until(lambda: fitter.num_fits == 1)
        for _ in range(5):  # the same rows would fail again
            parts.refitter.wake()
            await asyncio.sleep(0.005)
        assert (fitter.num_fits, version(parts)) == (1, 4)
        learn(parts, make, 2)
        await until(lambda: version(parts) == 5)
        parts.refitter.stop()
        await running
        assert parts.metrics.fit_failures.labels("default")._value.get() == 1
    assert "'default' could not be fitted" in caplog.text


async def test_a_failing_domain_does_not_keep_others_from_their_fits(start, make) -> None:
    with start(lambda: FailingFitter(2)).alive() as parts:
        running = asyncio.create_task(parts.refitter.run())
        learn(parts, make, 0, 1, domain="a")
        learn(parts, make, 0, 1, group_id="b", domain="b")
        await until(lambda: parts.metrics.fit_failures.labels("b")._value.get() == 1)
        assert not running.done()
        parts.refitter.stop()
        await running


async def test_a_probe_that_cannot_be_made_durable_does_not_answer_and_comes_once_it_can(
    start, make, monkeypatch
) -> None:
    monkeypatch.setattr(poise.value.updater, "_RETRY_S", 0.005)
    with start().alive() as parts:
        save, refusals = parts.store.save, iter(range(3))

        def full(snapshot):
            if next(refusals, None) is not None:
                assert version(parts) == 0
                raise OSError(28, "No space left on device")
            return save(snapshot)

        monkeypatch.setattr(parts.store, "save", full)
        learn(parts, make, 0, 1)
        await parts.refit_until(lambda: version(parts) == 1)
        assert next(refusals, None) is None
        assert parts.keeper.problem == ""


async def test_a_disk_that_is_full_is_told_and_is_no_failed_fit(start, make, monkeypatch) -> None:
    monkeypatch.setattr(poise.value.updater, "_RETRY_S", 0.005)
    with start().alive() as parts:
        write, refusals = safetensors.numpy.save_file, iter(range(3))

        def full(*arguments):
            if next(refusals, None) is not None:
                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
            write(*arguments)

        monkeypatch.setattr(safetensors.numpy, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            learn(parts, make, 0, 1)
            await parts.keeper.keep()
        assert "No space left" in parts.keeper.problem
        await parts.refit_until(lambda: version(parts) == 1)
        assert next(refusals, None) is None
        assert parts.metrics.fit_failures.labels("default")._value.get() == 0
        assert parts.keeper.problem == ""


async def test_a_service_whose_folder_is_anothers_gives_up(start, make) -> None:
    with start().alive() as parts:
        learn(parts, make, 0, 1)
        await parts.keeper.keep()
        assert parts.given_up == []
        (parts.store._folder / "lock").write_bytes(b"another")
        with pytest.raises(OSError, match="another may hold it"):
            await parts.keeper.keep()
        (reason,) = parts.given_up
        assert "another may hold it" in reason


async def test_questions_are_answered_while_a_fit_and_a_save_are_held(start, make, monkeypatch) -> None:
    """Neither takes the loop, nor a lock that a question needs: both are held until the questions are answered."""
    fitter = HeldFitter()
    with start(lambda: fitter).alive() as parts:
        save, begun, go = parts.store.save, threading.Event(), threading.Event()

        def held(snapshot):
            begun.set()
            assert go.wait(TIMEOUT_S)
            return save(snapshot)

        running = asyncio.create_task(parts.refitter.run())
        learn(parts, make, 0, 1)
        fitter.go.release()
        await until(lambda: version(parts) == 1)
        monkeypatch.setattr(parts.store, "save", held)
        learn(parts, make, 2)
        await until(lambda: fitter.num_begun == 2)
        keeping = asyncio.create_task(parts.keeper.keep())
        await until(begun.is_set)

        servicer = ValueServicer(parts.config)
        servicer.open(parts.estimator, parts.queue, parts.settling)
        for step in range(5):
            group = value_pb2.GroupFeatures(group_id="q", rollouts=make.message(make.label(step)).rollouts)
            request = value_pb2.EstimateBaselinesRequest(run_id="asked", step=step, groups=[group])
            answer = await asyncio.wait_for(servicer.EstimateBaselines(request, None), TIMEOUT_S)
            assert answer.groups[0].probe_version == 1
        assert not keeping.done()
        assert fitter.num_begun == 2
        assert version(parts) == 1

        go.set()
        await keeping
        fitter.go.release()
        await until(lambda: version(parts) == 2)
        parts.refitter.stop()
        await running


async def test_a_version_once_answered_is_never_given_to_another_probe_over_a_crash(start, make) -> None:
    with start().alive() as parts:
        learn(parts, make, 0, 1)
        await parts.refit_until(lambda: version(parts) == 1)
        (answer,) = parts.estimator.estimate("run", 9, [make.question("q")])
    with start().alive() as parts:  # nothing was saved after the answer
        learn(parts, make, 2)
        assert version(parts) == answer.probe_version == 1
        await parts.refit_until(lambda: version(parts) == 2)


async def test_stopping_waits_for_the_fit_in_hand(start, make) -> None:
    fitter = HeldFitter()
    with start(lambda: fitter).alive() as parts:
        running = asyncio.create_task(parts.refitter.run())
        learn(parts, make, 0, 1)
        await until(lambda: fitter.num_begun == 1)
        parts.refitter.stop()
        await asyncio.sleep(0.02)
        assert not running.done()
        fitter.go.release()
        await asyncio.wait_for(running, TIMEOUT_S)
        assert version(parts) == 1
    with start().alive() as parts:
        assert version(parts) == 1


async def test_saves_never_overlap_and_each_holds_the_state_when_it_began(start, make, monkeypatch) -> None:
    with start().alive() as parts:
        save, lock, numbers = parts.store.save, threading.Lock(), []

        def guarded(snapshot):
            assert lock.acquire(blocking=False), "two saves at once"
            try:
                numbers.append(snapshot.num_groups_consumed)
                return save(snapshot)
            finally:
                lock.release()

        monkeypatch.setattr(parts.store, "save", guarded)

        async def learn_and_keep(step: int) -> None:
            learn(parts, make, step)
            await parts.keeper.keep()

        await asyncio.gather(*(learn_and_keep(step) for step in range(5)))
        assert numbers[-1] == 5


async def test_an_unfit_group_is_dead_lettered_and_the_rest_fitted(start, make, caplog) -> None:
    with start(lambda: PickyFitter(["bad"])).alive() as parts:
        learn(parts, make, 0, 1, 2)
        learn(parts, make, 3, group_id="bad")
        bad = parts.estimator.domains["default"].window.groups[-1]
        await parts.refit_until(lambda: version(parts) == 1)
        (letter,) = await parts.queue.dead_letters(max_entries=9)
        assert "no probe can be fitted with it" in letter.reason
        again = parse_label(letter.payload, 2**20)
        assert (again.step, again.group_id) == (3, "bad")
        np.testing.assert_array_equal(again.rows.prompt_hidden, bad.rows.prompt_hidden)
        np.testing.assert_array_equal(again.rows.entropies, bad.rows.entropies)
    assert "Traceback" not in caplog.text
    with start(lambda: PickyFitter(["bad"])).alive() as parts:  # it is gone for good, and cannot be learnt again
        groups = parts.estimator.domains["default"].window.groups
        assert [group.step for group in groups] == [0, 1, 2]
        learn(parts, make, 3, group_id="bad")
        assert parts.estimator.num_duplicates == 1
        learn(parts, make, 4)
        await parts.refit_until(lambda: version(parts) == 2)


async def test_a_group_stays_while_its_dead_letter_cannot_be_sent(start, make, monkeypatch) -> None:
    with start(lambda: PickyFitter(["bad"])).alive() as parts:
        learn(parts, make, 0, 1, 2)
        learn(parts, make, 3, group_id="bad")
        num_tries = 0

        async def down(delivery, reason):
            nonlocal num_tries
            num_tries += 1
            raise BackendDown("Redis is down")

        with monkeypatch.context() as broken:
            broken.setattr(parts.queue, "dead_letter", down)
            await parts.refit_until(lambda: num_tries == 1)
        assert len(parts.estimator.domains["default"].window.groups) == 4


async def test_a_fit_that_fails_whatever_is_in_it_costs_no_label(start, make) -> None:
    names = [f"g{step}" for step in range(6)]
    with start(lambda: PickyFitter(names)).alive() as parts:
        for step, name in enumerate(names):
            learn(parts, make, step, group_id=name)
        await parts.refit_until(lambda: parts.refitter.gives_up("default"))
        assert len(parts.estimator.domains["default"].window.groups) == 6
        assert await parts.queue.dead_letters(max_entries=9) == []
