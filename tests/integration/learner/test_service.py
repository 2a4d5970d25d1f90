"""The learner service over real gRPC."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import transformers
from tests.integration.learner.replicas import NO_RETRIES, TIMEOUT_S, eventually, interceptors
from tests.unit.learner.batches import VOCABULARY, make_batch, make_config, rewarded

from poise.errors import Draining
from poise.generation.served_policy import ServedPolicy
from poise.learner.app import LearnerApp, build
from poise.learner.models.policy import Policy
from poise.learner.publishing import replica as replica_module
from poise.learner.storage.checkpoint import CheckpointStore, StateError
from poise.learner.training.trainer import Trainer
from poise.runtime.rpc.validation import Violations
from poise_client import AsyncLearnerClient
from poise_client._transport.status import error_from_rpc
from poise_client.codec import encode, to_tensor
from poise_client.errors import ConflictError, InvalidRequestError, PoiseClientError, UnavailableError
from poise_client.types import Batch, VersionSpan
from poise_proto.v1 import learner_pb2 as pb
from poise_proto.v1.learner_pb2_grpc import LearnerServiceStub

MODEL_TOKENS = 512


@dataclasses.dataclass
class Service:
    """A learner service in this process."""

    app: LearnerApp
    client: AsyncLearnerClient
    stub: LearnerServiceStub
    stopped: bool = False
    """Whether the test stopped it."""


@pytest.fixture
async def serve(model, tmp_path) -> AsyncIterator[Callable[..., Awaitable[Service]]]:
    """Serves a learner in this process; stops an earlier one with the same state."""
    running: list[Callable[[], Awaitable[None]]] = []

    async def stop() -> None:
        while running:
            await running.pop()()

    async def start(*, recover: bool = True, **changes: Any) -> Service:
        await stop()
        app = build(make_config(model, tmp_path / "state", **{"checkpoint_every_steps": 100} | changes))
        server = grpc.aio.server(interceptors=interceptors("learner", app.registry))
        app.register(server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        channel = grpc.aio.insecure_channel(address)
        client = AsyncLearnerClient(address, retries=NO_RETRIES, timeout_s=TIMEOUT_S)
        service = Service(app, client, LearnerServiceStub(channel))

        async def end() -> None:
            await client.close()
            await channel.close()
            await server.stop(None)
            if not service.stopped:
                await app.stop()

        running.append(end)
        if recover:
            await app.start()
        return service

    yield start
    await stop()


class Gate:
    """Blocks the learner's thread in a method of a class, and counts the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, target: type, name: str) -> None:
        self.arrived, self.release = threading.Semaphore(0), threading.Event()
        self.threads: list[str] = []
        self.inside = self.most = 0
        work = getattr(target, name)

        def held(*args: Any, **kwargs: Any) -> Any:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.threads.append(threading.current_thread().name)
            self.arrived.release()
            assert self.release.wait(TIMEOUT_S)
            try:
                return work(*args, **kwargs)
            finally:
                self.inside -= 1

        monkeypatch.setattr(target, name, held)

    async def reached(self) -> None:
        await eventually(lambda: self.arrived.acquire(blocking=False))


def messages(batch: Batch) -> list[pb.SubmitAdvantagesRequest]:
    return [
        pb.SubmitAdvantagesRequest(header=encode(batch, pb.BatchHeader)),
        *(pb.SubmitAdvantagesRequest(rollout=encode(rollout, pb.TrainingRollout)) for rollout in batch.rollouts),
    ]


async def refusal_of(service: Service, requests: Sequence[pb.SubmitAdvantagesRequest]) -> PoiseClientError:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await service.stub.SubmitAdvantages(iter(requests))
    return error_from_rpc(refused.value, "SubmitAdvantages")


async def assert_untouched(service: Service) -> None:
    status = await service.client.get_status()
    assert (status.policy_version, status.num_batches, status.state) == (0, 0, "idle")
    assert not list((service.app.config.state_dir / "journal").iterdir())


async def test_weights_are_served_when_the_answer_arrives(serve, replica):
    replicas = [await replica(), await replica()]
    service = await serve(replicas=tuple(one.address for one in replicas))
    for one in replicas:
        await eventually(lambda one=one: one.applied == [0])
    result = await service.client.submit_advantages(make_batch(0))
    assert (result.policy_version, result.duplicate, result.rejected) == (1, False, ())
    assert result.metrics.num_rollouts == 6
    assert result.metrics.publish_s > 0
    assert [(r.policy_version, r.current) for r in result.replicas] == [(1, True)] * 2
    status = await service.client.get_status()
    assert (status.policy_version, status.last_batch_id, status.num_rollouts) == (1, "step-00000000", 6)
    for one in replicas:
        assert one.policy == ServedPolicy(status.lineage_id, 1, status.digest)
        assert one.applied == [0, 1]


async def test_bfloat16_weights_are_pushed(serve, replica):
    one = await replica()
    service = await serve(replicas=(one.address,), dtype="bfloat16")
    await service.client.submit_advantages(make_batch(0))
    status = await service.client.get_status()
    assert one.policy.digest == status.digest
    num_parameters = sum(len(data) for data in one.tensors.values()) / 2
    loaded = transformers.AutoModelForCausalLM.from_pretrained(service.app.config.model)
    assert num_parameters == sum(parameter.numel() for parameter in loaded.parameters())


def broken(change: Callable[[pb.TrainingRollout], None]) -> Callable[[list[pb.SubmitAdvantagesRequest]], None]:
    """Changes the second rollout."""
    return lambda requests: change(requests[2].rollout)


def header(**values: Any) -> Callable[[list[pb.SubmitAdvantagesRequest]], None]:
    def change(requests: list[pb.SubmitAdvantagesRequest]) -> None:
        for name, value in values.items():
            setattr(requests[0].header, name, value)

    return change


def tensor(name: str, values: Any, dtype: Any = "int32") -> Callable[[list[pb.SubmitAdvantagesRequest]], None]:
    return broken(lambda rollout: getattr(rollout, name).CopyFrom(to_tensor(np.array(values), dtype)))


def advantages(values: list[Any], dtype: Any = "float32") -> Callable[[list[pb.SubmitAdvantagesRequest]], None]:
    """Sends one advantage per token instead of one per rollout."""

    def change(rollout: pb.TrainingRollout) -> None:
        rollout.ClearField("advantage")
        rollout.advantages.CopyFrom(to_tensor(np.array(values), dtype))

    return broken(change)


def spans(*ends: tuple[int, int]) -> Callable[[list[pb.SubmitAdvantagesRequest]], None]:
    """Spans of a response of six tokens."""

    def change(rollout: pb.TrainingRollout) -> None:
        del rollout.version_spans[:]
        for start, end in ends:
            rollout.version_spans.add(start_token=start, end_token=end)

    return broken(change)


LONG = [1] * (MODEL_TOKENS + 1)

WRONG: dict[str, tuple[Callable[[list[pb.SubmitAdvantagesRequest]], Any], str]] = {
    "nothing at all": (lambda requests: requests.clear(), "part"),
    "no header": (lambda requests: requests.pop(0), "part"),
    "an empty message": (lambda requests: requests[0].Clear(), "part"),
    "an empty message later": (lambda requests: requests[2].Clear(), "part"),
    "a second header": (lambda requests: requests.append(requests[0]), "part"),
    "too few": (lambda requests: requests.pop(), "header.num_rollouts"),
    "too many": (lambda requests: requests.append(requests[1]), "header.num_rollouts"),
    "none announced": (header(num_rollouts=0), "header.num_rollouts"),
    "too many announced": (header(num_rollouts=65537), "header.num_rollouts"),
    "no run": (header(run_id=""), "header.run_id"),
    "no batch": (header(batch_id=""), "header.batch_id"),
    "a batch no name": (header(batch_id="step 1"), "header.batch_id"),
    "a batch name too long": (header(batch_id="x" * 129), "header.batch_id"),
    "greedy": (header(temperature=0.0), "header.temperature"),
    "cold": (header(temperature=-1.0), "header.temperature"),
    "hot": (header(temperature=101.0), "header.temperature"),
    "no temperature": (header(temperature=float("nan")), "header.temperature"),
    "rollout of no run": (broken(lambda r: r.id.ClearField("run_id")), "rollouts[1].id.run_id"),
    "rollout of no group": (broken(lambda r: r.id.ClearField("group_id")), "rollouts[1].id.group_id"),
    "no id": (broken(lambda r: r.ClearField("id")), "rollouts[1].id.group_id"),
    "no prompt": (broken(lambda r: r.ClearField("prompt_token_ids")), "rollouts[1].prompt_token_ids"),
    "an empty prompt": (tensor("prompt_token_ids", []), "rollouts[1].prompt_token_ids"),
    "a prompt of floats": (tensor("prompt_token_ids", [1.5], "float32"), "rollouts[1].prompt_token_ids"),
    "a prompt of longs": (tensor("prompt_token_ids", [1], "int64"), "rollouts[1].prompt_token_ids"),
    "a prompt of two axes": (tensor("prompt_token_ids", [[1]]), "rollouts[1].prompt_token_ids"),
    "a negative token": (tensor("prompt_token_ids", [3, -1]), "rollouts[1].prompt_token_ids"),
    "an unknown token": (tensor("token_ids", [VOCABULARY + 99] * 6), "rollouts[1].token_ids"),
    "no response": (broken(lambda r: r.ClearField("token_ids")), "rollouts[1].token_ids"),
    "too long": (tensor("prompt_token_ids", LONG), "rollouts[1].token_ids"),
    "logprobs too few": (tensor("logprobs", [-1.0] * 5, "float32"), "rollouts[1].logprobs"),
    "logprobs above 0": (tensor("logprobs", [-1.0] * 5 + [0.1], "float32"), "rollouts[1].logprobs"),
    "logprobs of nothing": (
        tensor("logprobs", [-1.0] * 5 + [float("nan")], "float32"),
        "rollouts[1].logprobs",
    ),
    "logprobs without end": (
        tensor("logprobs", [-1.0] * 5 + [-float("inf")], "float32"),
        "rollouts[1].logprobs",
    ),
    "advantage of nothing": (
        broken(lambda r: setattr(r, "advantage", float("nan"))),
        "rollouts[1].advantage",
    ),
    "advantage without end": (broken(lambda r: setattr(r, "advantage", float("inf"))), "rollouts[1].advantage"),
    **{
        f"advantage {number:g}": (
            broken(lambda r, number=number: setattr(r, "advantage", number)),
            "rollouts[1].advantage",
        )
        for number in (1e30, -1e30, 1.1e4, -3e38)
    },
    "no advantage": (broken(lambda r: r.ClearField("advantage")), "rollouts[1].advantage"),
    "advantage and advantages": (tensor("advantages", [0.5] * 6, "float32"), "rollouts[1].advantages"),
    "advantages too few": (advantages([0.5] * 5), "rollouts[1].advantages"),
    "advantages too many": (advantages([0.5] * 7), "rollouts[1].advantages"),
    "no advantages in a tensor": (advantages([]), "rollouts[1].advantages"),
    "advantages of integers": (advantages([1] * 6, "int32"), "rollouts[1].advantages"),
    "advantages of two axes": (advantages([[0.5] * 6]), "rollouts[1].advantages"),
    **{
        f"advantages {number:g}": (advantages([0.5] * 5 + [number]), "rollouts[1].advantages")
        for number in (float("nan"), float("inf"), -float("inf"), 1.1e4, -3e38)
    },
    **{
        f"logprob {number:g}": (
            tensor("logprobs", [-1.0] * 5 + [number], "float32"),
            "rollouts[1].logprobs",
        )
        for number in (-1e30, -3e38, -81.0)
    },
    "almost greedy": (header(temperature=1e-30), "header.temperature"),
    "data cut": (
        broken(lambda r: setattr(r.token_ids, "data", b"\0" * 23)),
        "rollouts[1].token_ids",
    ),
    "no span": (spans(), "rollouts[1].version_spans"),
    "spans too short": (spans((0, 5)), "rollouts[1].version_spans"),
    "spans too long": (spans((0, 7)), "rollouts[1].version_spans"),
    "spans with a gap": (spans((0, 2), (3, 6)), "rollouts[1].version_spans"),
    "spans that overlap": (spans((0, 4), (3, 6)), "rollouts[1].version_spans"),
    "spans that start late": (spans((1, 6)), "rollouts[1].version_spans"),
    "an empty span": (spans((0, 0), (0, 6)), "rollouts[1].version_spans"),
}


async def test_every_wrong_field_is_named_and_nothing_is_trained_on(serve):
    service = await serve()
    for what, (change, field) in WRONG.items():
        requests = messages(make_batch(0))
        change(requests)
        error = await refusal_of(service, requests)
        assert isinstance(error, InvalidRequestError), what
        assert field in [name for name, _ in error.violations], (what, error)
        assert not error.retryable
    await assert_untouched(service)
    assert (
        await service.client.submit_advantages(make_batch(0))
    ).policy_version == 1  # the unchanged batch is accepted


REWARDS_WRONG: dict[str, tuple[Callable[[list[pb.SubmitAdvantagesRequest]], Any], str]] = {
    "no reward": (broken(lambda r: r.ClearField("reward")), "rollouts[1].reward"),
    "reward of nothing": (broken(lambda r: setattr(r, "reward", float("nan"))), "rollouts[1].reward"),
    "reward without end": (broken(lambda r: setattr(r, "reward", -float("inf"))), "rollouts[1].reward"),
    "a reward too large": (broken(lambda r: setattr(r, "reward", 1e30)), "rollouts[1].reward"),
    "a reward too low": (broken(lambda r: setattr(r, "reward", -2e4)), "rollouts[1].reward"),
    "an advantage": (broken(lambda r: setattr(r, "advantage", 0.5)), "rollouts[1].advantage"),
    "no advantage that is": (broken(lambda r: setattr(r, "advantage", float("nan"))), "rollouts[1].advantage"),
}


@pytest.mark.parametrize(("advantage", "temperature"), [(1e4, 0.01), (-1e4, 100.0), (1e-38, 1.0)])
async def test_the_extremes_that_are_accepted_can_be_trained_on(serve, advantage: float, temperature: float):
    service = await serve()
    requests = messages(make_batch(0))
    header(temperature=temperature)(requests)
    tensor("logprobs", [-80.0] * 6, "float32")(requests)
    for request in requests[1:]:
        request.rollout.advantage = advantage
    answer = await service.stub.SubmitAdvantages(iter(requests))
    assert (answer.policy_version, answer.metrics.num_skipped_updates) == (1, 0)
    assert np.isfinite([answer.metrics.loss, answer.metrics.gradient_norm]).all()


async def test_critic_needs_rewards_and_no_advantages(serve):
    service = await serve(critic={})
    for what, (change, field) in REWARDS_WRONG.items():
        requests = messages(rewarded(make_batch(0)))
        change(requests)
        error = await refusal_of(service, requests)
        assert isinstance(error, InvalidRequestError), what
        assert [name for name, _ in error.violations] == [field], (what, error)
        assert "the learner has a critic: send a finite reward and no advantages" in str(error)
    await assert_untouched(service)
    status = await service.client.get_status()
    assert (status.has_critic, status.loss_aggregation) == (True, "token_mean")
    result = await service.client.submit_advantages(rewarded(make_batch(0)))
    assert result.policy_version == 1
    assert result.metrics.value_loss > 0
    for name in ("value_loss", "explained_variance_ratio", "critic_gradient_norm"):
        number = {"explained_variance_ratio": "explained_variance"}.get(name, name)
        told = service.app.registry.get_sample_value(f"poise_learner_{name}")
        assert told == getattr(result.metrics, number), name


async def test_a_learner_without_a_critic_takes_no_rewards(serve):
    service = await serve()
    requests = messages(make_batch(0))
    requests[2].rollout.reward = 0.0
    error = await refusal_of(service, requests)
    assert isinstance(error, InvalidRequestError)
    assert [name for name, _ in error.violations] == ["rollouts[1].reward"]
    assert "the learner has no critic. Leave it unset, or set `critic`" in str(error)
    await assert_untouched(service)
    assert not (await service.client.get_status()).has_critic


async def test_all_wrong_fields_are_named_at_once(serve):
    service = await serve()
    requests = messages(make_batch(0))
    requests[1].rollout.advantage = float("nan")
    requests[2].rollout.ClearField("token_ids")
    requests[4].rollout.id.run_id = "no name"
    error = await refusal_of(service, requests[:-1])
    assert [name for name, _ in error.violations] == [
        "rollouts[0].advantage",
        "rollouts[1].token_ids",
        "rollouts[3].id.run_id",
        "header.num_rollouts",
    ]


async def test_incomplete_stream_trains_on_nothing(serve):
    service = await serve()
    for _ in range(2):
        call = service.stub.SubmitAdvantages()
        for message in messages(make_batch(0))[:4]:
            await call.write(message)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    error = await refusal_of(service, messages(make_batch(0))[:4])  # closed properly, but too early
    assert "3 rollouts were sent. Nothing was trained on" in str(error)
    await assert_untouched(service)


async def test_rejection_reaches_a_caller_that_is_still_sending(serve):
    service = await serve()
    await service.app.pause()
    call = service.stub.SubmitAdvantages()
    for message in messages(make_batch(0)):
        await call.write(message)
        await asyncio.sleep(0.02)  # long enough for an early answer to show
    await call.done_writing()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "paused" in refused.value.details()


async def test_conflict_raises_its_own_error(serve):
    service = await serve()
    await service.client.submit_advantages(make_batch(0))
    with pytest.raises(ConflictError, match="with other content"):
        await service.client.submit_advantages(make_batch(0, seed=1))
    assert (await service.client.get_status()).policy_version == 1


async def test_rejected_rollouts_are_returned_by_name(serve):
    service = await serve()
    await service.client.submit_advantages(make_batch(0))
    result = await service.client.submit_advantages(make_batch(1, version=0))
    assert result.policy_version == 1
    assert result.rejected == tuple((r.id, "stale") for r in make_batch(1).rollouts)
    status = await service.client.get_status()
    assert (status.num_rejected, status.max_staleness) == ({"stale": 6}, 0)


async def test_disconnected_caller_gets_the_answer_on_resubmission(serve, monkeypatch, replica):
    one = await replica()
    service = await serve(replicas=(one.address,))
    gate = Gate(monkeypatch, Trainer, "train")
    asking = asyncio.create_task(service.client.submit_advantages(make_batch(0)))
    await gate.reached()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    gate.release.set()
    await eventually(lambda: one.policy.policy_version == 1)  # although no call waits for it
    result = await service.client.submit_advantages(make_batch(0))
    assert (result.policy_version, result.duplicate) == (1, True)
    assert result.metrics.num_rollouts == 6
    assert len(gate.threads) == 1


async def test_two_batches_at_once_are_trained_on_one_after_the_other(serve, monkeypatch):
    service = await serve(max_staleness=1)
    gate = Gate(monkeypatch, Trainer, "train")
    asking = [asyncio.create_task(service.client.submit_advantages(make_batch(step, version=0))) for step in (0, 1)]
    await gate.reached()
    gate.release.set()
    assert {result.policy_version for result in await asyncio.gather(*asking)} == {1, 2}
    assert gate.most == 1
    assert len(set(gate.threads)) == 1


async def test_the_same_batch_twice_at_once_is_trained_on_once(serve, monkeypatch):
    service = await serve()
    gate = Gate(monkeypatch, Trainer, "train")
    asking = [asyncio.create_task(service.client.submit_advantages(make_batch(0))) for _ in range(3)]
    await gate.reached()
    gate.release.set()
    results = await asyncio.gather(*asking)
    assert sorted(result.duplicate for result in results) == [False, True, True]
    assert {result.policy_version for result in results} == {1}
    assert len(gate.threads) == 1


async def test_checkpoint_request_waits_for_training(serve, monkeypatch):
    service = await serve()
    gate = Gate(monkeypatch, Trainer, "train")
    saved: list[tuple[int, str]] = []
    save = CheckpointStore.save

    def noted(store: CheckpointStore, *args: Any) -> Path:
        saved.append((gate.inside, threading.current_thread().name))
        return save(store, *args)

    monkeypatch.setattr(CheckpointStore, "save", noted)
    asking = asyncio.create_task(service.client.submit_advantages(make_batch(0)))
    await gate.reached()
    checkpoint = asyncio.create_task(service.app.checkpoint())
    exporting = asyncio.create_task(service.client.export_model("mine"))
    status = await service.client.get_status()  # it does not wait for the batch
    assert (status.state, status.policy_version, status.checkpoint_version) == ("training", 0, 0)
    assert not saved
    gate.release.set()
    assert (await checkpoint)["policy_version"] == 1
    assert (await exporting).policy_version == 1
    await asking
    assert saved == [(0, "checkpoint_0")]
    assert (await service.client.get_status()).checkpoint_version == 1


async def test_status_shows_one_version_while_the_next_is_trained(serve, monkeypatch):
    """Between counting a batch and publishing its weights."""
    service = await serve()
    before = await service.client.get_status()
    gate = Gate(monkeypatch, Trainer, "weights")
    asking = asyncio.create_task(service.client.submit_advantages(make_batch(0)))
    await gate.reached()
    status = await service.client.get_status()
    assert (status.policy_version, status.digest) == (0, before.digest)
    gate.release.set()
    await asking
    after = await service.client.get_status()
    assert after.policy_version == 1
    assert after.digest != before.digest


async def test_paused_learner_finishes_its_batch_and_rejects_others(serve, monkeypatch):
    service = await serve()
    gate = Gate(monkeypatch, Trainer, "train")
    asking = asyncio.create_task(service.client.submit_advantages(make_batch(0)))
    await gate.reached()
    await service.app.pause()
    assert not service.app.readiness().ready
    assert (await service.client.get_status()).state == "training"
    gate.release.set()
    assert (await asking).policy_version == 1
    with pytest.raises(UnavailableError, match="paused") as refused:
        await service.client.submit_advantages(make_batch(1))
    assert (refused.value.reason, refused.value.retryable) == ("DRAINING", True)
    assert (await service.client.get_status()).state == "paused"
    await service.app.resume()
    assert service.app.readiness().ready
    assert (await service.client.submit_advantages(make_batch(1))).policy_version == 2


async def test_draining_finishes_the_batch_and_writes_a_checkpoint(serve, monkeypatch):
    service = await serve()
    gate = Gate(monkeypatch, Trainer, "train")
    first = asyncio.create_task(service.client.submit_advantages(make_batch(0)))
    await gate.reached()
    behind = asyncio.create_task(service.client.submit_advantages(make_batch(1)))
    draining = asyncio.create_task(service.app.drain())
    await eventually(lambda: "shutting down" in service.app.readiness().reason)
    await service.app.resume()  # a closing learner stays closed
    with pytest.raises(UnavailableError, match="shutting down"):
        await service.client.submit_advantages(make_batch(2))
    gate.release.set()
    assert (await first).policy_version == 1
    with pytest.raises(UnavailableError, match="shutting down"):
        await behind
    await draining
    assert service.app.status()["checkpoint_version"] == 1
    folder = service.app.config.state_dir
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-00000001"]


async def test_stopping_unlocks_the_state_after_the_current_batch(serve, monkeypatch):
    service = await serve()
    gate = Gate(monkeypatch, Trainer, "train")
    asking = asyncio.create_task(service.client.submit_advantages(make_batch(0)))
    await gate.reached()
    service.stopped = True
    stopping = asyncio.create_task(service.app.stop())
    await asyncio.sleep(0.05)  # long enough for a mistake to show
    other = CheckpointStore(service.app.config.state_dir, keep=1)
    with pytest.raises(StateError, match="in use"):
        other.open()
    gate.release.set()
    await stopping
    other.open()
    other.close()
    await asyncio.gather(asking, return_exceptions=True)


async def test_failed_training_exits_and_a_restart_retries(serve, monkeypatch, replica):
    one = await replica()
    service = await serve(replicas=(one.address,))
    await service.client.submit_advantages(make_batch(0))
    update, calls = Trainer.update, []

    def fail(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return update(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", fail)
        with pytest.raises(UnavailableError, match="out of memory") as refused:
            await service.client.submit_advantages(make_batch(1))
    assert refused.value.retryable
    assert service.app.failed.is_set()
    assert "out of memory" in service.app.readiness().reason
    with pytest.raises(UnavailableError):
        await service.client.submit_advantages(make_batch(2))
    await service.app.drain()
    assert not list(service.app.config.state_dir.glob("checkpoint-*"))
    again = await serve(replicas=(one.address,))
    result = await again.client.submit_advantages(make_batch(1))
    assert (result.policy_version, result.duplicate) == (2, True)
    await eventually(lambda: one.policy.policy_version == 2)


async def test_stored_answer_waits_until_its_weights_are_pushed(serve, replica):
    """The learner restarts before it could push. A retrying caller must be able to sample the version in the answer."""
    one = await replica()
    first = await serve()
    await first.client.submit_advantages(make_batch(0))
    again = await serve(replicas=(one.address,))
    result = await again.client.submit_advantages(make_batch(0))
    assert result.duplicate
    assert [(r.policy_version, r.current) for r in result.replicas] == [(1, True)]
    assert one.applied == [1]


async def test_restarted_replica_gets_the_current_version(serve, replica):
    one = await replica()
    service = await serve(replicas=(one.address,))
    await service.client.submit_advantages(make_batch(0))
    await one.restart()
    await eventually(lambda: one.policy.policy_version == 1)
    await eventually(lambda: service.app.status()["replicas"][0]["current"])


async def test_a_step_does_not_wait_for_a_replica_that_is_down(serve, replica, monkeypatch):
    monkeypatch.setattr(replica_module, "_GET_POLICY_TIMEOUT_S", 10 * TIMEOUT_S)
    one = await replica()
    await one.stop()
    service = await serve(replicas=(one.address,), push={"timeout_s": 10 * TIMEOUT_S})
    result = await service.client.submit_advantages(make_batch(0))
    assert [r.current for r in result.replicas] == [False]
    assert result.replicas[0].error


async def test_nothing_is_answered_while_recovering(serve):
    service = await serve(recover=False)
    for call in (
        service.client.get_status(),
        service.client.export_model("mine"),
        service.client.submit_advantages(make_batch(0)),
    ):
        with pytest.raises(UnavailableError, match="recovering"):
            await call
    for action in (service.app.pause, service.app.resume, service.app.checkpoint):
        with pytest.raises(Draining):
            await action()
    assert service.app.status() == {"state": "recovering"}
    assert service.app.readiness().reason == "recovering"


async def test_restart_resumes_from_the_last_batch(serve):
    first = await serve()
    for step in range(3):
        await first.client.submit_advantages(make_batch(step))
    await first.app.checkpoint()
    await first.client.submit_advantages(make_batch(3))
    before = await first.client.get_status()
    again = await serve()
    after = await again.client.get_status()
    assert after == before
    assert again.app.registry.get_sample_value("poise_learner_policy_version") == 4
    assert (await again.client.submit_advantages(make_batch(4))).policy_version == 5


async def test_state_dir_in_use_is_rejected_at_the_start(serve, model, tmp_path):
    await serve()
    second = build(make_config(model, tmp_path / "state"))
    with pytest.raises(StateError, match="in use by another learner"):
        await second.start()
    await second.stop()


@pytest.mark.parametrize("name", ["", "..", ".", "../up", "a/b", "/etc", ".hidden", "x" * 65, "a\0b", "naïve", "a b"])
async def test_export_name_that_is_a_path_is_rejected(serve, name, tmp_path):
    service = await serve()
    with pytest.raises(InvalidRequestError) as refused:
        await service.client.export_model(name)
    assert [field for field, _ in refused.value.violations] == ["name"]
    assert not (tmp_path / "state" / "exports").exists()


async def test_an_export_is_a_folder_that_transformers_loads(serve, tmp_path):
    service = await serve(export_dir=tmp_path / "exports")
    await service.client.submit_advantages(make_batch(0))
    export = await service.client.export_model("step-1")
    assert (export.path, export.policy_version) == (str((tmp_path / "exports" / "step-1").resolve()), 1)
    transformers.AutoModelForCausalLM.from_pretrained(export.path)
    assert transformers.AutoTokenizer.from_pretrained(export.path)("x").input_ids


async def test_metrics_count_batches_rollouts_rejections_and_replicas(serve, replica):
    one = await replica()
    service = await serve(replicas=(one.address,))
    await service.client.submit_advantages(make_batch(0))
    await service.client.submit_advantages(make_batch(0))
    stale = make_batch(1, version=0)
    spans = (VersionSpan(0, 4, 1),)
    mixed = dataclasses.replace(
        stale, rollouts=(*stale.rollouts[1:], dataclasses.replace(stale.rollouts[0], version_spans=spans))
    )
    await service.client.submit_advantages(mixed)
    value = service.app.registry.get_sample_value
    assert value("poise_learner_policy_version") == 2
    assert value("poise_learner_batches_total", {"duplicate": "false"}) == 2
    assert value("poise_learner_batches_total", {"duplicate": "true"}) == 1
    assert value("poise_learner_rollouts_total") == 7
    assert value("poise_learner_rejected_rollouts_total", {"reason": "stale"}) == 5
    assert value("poise_learner_staleness_versions_count") == 7
    assert value("poise_learner_replica_current", {"replica": one.address}) == 1
    assert value("poise_learner_replica_policy_version", {"replica": one.address}) == 2


async def test_repeated_export_request_joins_the_running_one(serve, monkeypatch):
    service = await serve()
    saving, asked = Gate(monkeypatch, Policy, "save"), Gate(monkeypatch, Violations, "folder_name")
    asked.release.set()
    first = asyncio.create_task(service.client.export_model("mine"))
    await saving.reached()
    first.cancel()
    again = asyncio.create_task(service.client.export_model("mine"))
    await eventually(lambda: len(asked.threads) == 2)
    saving.release.set()
    assert (await again).policy_version == 0
    assert len(saving.threads) == 1
    await service.client.submit_advantages(make_batch(0))
    assert (await service.client.export_model("mine")).policy_version == 1  # a new export


async def test_export_replaces_only_exports(serve, tmp_path):
    service = await serve(export_dir=tmp_path)  # as in a run on one machine
    with pytest.raises(InvalidRequestError, match=r"state already exists and is not an export") as refused:
        await service.client.export_model("state")
    assert [field for field, _ in refused.value.violations] == ["name"]
    assert (await service.client.submit_advantages(make_batch(0))).policy_version == 1
