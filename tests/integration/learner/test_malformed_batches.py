"""Batches of excessive size or invalid shape are rejected with short errors and not trained on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.integration.learner.test_service import Service, assert_untouched, messages, refusal_of, serve
from tests.unit.learner.batches import make_batch

from poise.errors import Draining
from poise_client.errors import InvalidRequestError, UnavailableError
from poise_proto.v1 import common_pb2
from poise_proto.v1 import learner_pb2 as pb

__all__ = ["serve"]  # a fixture

SPAN = common_pb2.VersionSpan(start_token=0, end_token=1)


def changed(**fields: Any) -> list[pb.SubmitAdvantagesRequest]:
    """Return a batch whose first rollout has other fields."""
    sent = messages(make_batch(0))
    for name in fields:
        sent[1].rollout.ClearField(name)
    sent[1].rollout.MergeFrom(pb.TrainingRollout(**fields))
    return sent


def many_wrong(number: int) -> list[pb.SubmitAdvantagesRequest]:
    header, *_ = messages(make_batch(0))
    header.header.num_rollouts = number
    return [header, *[pb.SubmitAdvantagesRequest(rollout=pb.TrainingRollout())] * number]


BATCHES = {
    "axes": changed(prompt_token_ids=common_pb2.Tensor(dtype=common_pb2.DTYPE_INT32, shape=[2] * 500_000)),
    "large axes": changed(logprobs=common_pb2.Tensor(dtype=common_pb2.DTYPE_FLOAT32, shape=[2**32 - 1] * 9999)),
    "large axis": changed(token_ids=common_pb2.Tensor(dtype=common_pb2.DTYPE_INT32, shape=[2**32 - 1])),
    "spans": changed(version_spans=[SPAN] * 900_000),
    "long run": changed(id=common_pb2.RolloutId(run_id="r" * 3_000_000)),
    "many wrong rollouts": many_wrong(3000),
}


@pytest.mark.parametrize("how", BATCHES)
async def test_batch_of_impossible_size_is_rejected(serve, how: str) -> None:
    service: Service = await serve()
    error = await refusal_of(service, BATCHES[how])
    assert isinstance(error, InvalidRequestError)
    assert len(error.message) <= 600
    await assert_untouched(service)


async def test_idle_uploads_do_not_delay_get_status(serve) -> None:
    service: Service = await serve()

    async def idle() -> AsyncIterator[pb.SubmitAdvantagesRequest]:
        await asyncio.Event().wait()
        yield messages(make_batch(0))[0]

    uploads = [service.stub.SubmitAdvantages(idle()) for _ in range(300)]
    assert (await service.client.get_status()).state == "idle"
    for upload in uploads:
        upload.cancel()


async def test_a_stopped_learner_says_that_it_shuts_down(serve) -> None:
    service: Service = await serve()
    service.stopped = True
    await service.app.stop()
    with pytest.raises(UnavailableError, match="shutting down"):
        await service.client.export_model("late")
    with pytest.raises(Draining):
        await service.app.checkpoint()
