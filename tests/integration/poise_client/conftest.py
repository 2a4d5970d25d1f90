"""A server on 127.0.0.1 with three scripted servicers."""

# ruff: noqa: N802 (gRPC names the methods)

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import grpc
import numpy as np
import pytest
from google.protobuf.any_pb2 import Any
from google.rpc import error_details_pb2, status_pb2
from tests.support.ports import free_port

from poise_client import codec
from poise_client.types import EncodedPrompt, Features, Group, PromptCheck, Rollout, RolloutId
from poise_proto.v1 import errors_pb2
from poise_proto.v1 import generation_pb2 as generation
from poise_proto.v1 import learner_pb2 as learner
from poise_proto.v1 import value_pb2 as value
from poise_proto.v1.generation_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server
from poise_proto.v1.learner_pb2_grpc import LearnerServiceServicer, add_LearnerServiceServicer_to_server
from poise_proto.v1.value_pb2_grpc import ValueServiceServicer, add_ValueServiceServicer_to_server


async def fail(context, code, *, reason=None, retryable=True, retry_after_s=None, violations=(), message="scripted"):
    """End the call with a rich status, as the services do, or with a bare one if `reason` is None."""
    details = []
    if reason is not None:
        details.append(errors_pb2.PoiseErrorDetail(reason=f"ERROR_REASON_{reason}", retryable=retryable))
    if retry_after_s is not None:
        details.append(error_details_pb2.RetryInfo())
        details[-1].retry_delay.FromMilliseconds(round(retry_after_s * 1000))
    if violations:
        details.append(error_details_pb2.BadRequest())
        for field, description in violations:
            details[-1].field_violations.add(field=field, description=description)
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = Any()
        packed.Pack(detail)
        status.details.append(packed)
    trailing = (("grpc-status-details-bin", status.SerializeToString()),) if details else ()
    await context.abort(code, message, trailing)


def group_message(request, group_id):
    """Return a group as from the service, with n rollouts of two tokens."""
    state = Features(np.ones(3, np.float32), np.ones(3, np.float32))
    per_token = {"token_entropies": np.zeros(2, np.float16), "sum_squared_probs": np.ones(2, np.float16)}
    rollouts = tuple(
        Rollout(
            RolloutId(request.run_id, request.step, group_id, i),
            np.array([1], np.int32),
            np.array([5, 6], np.int32),
            np.zeros(2, np.float32),
            features=state,
            text="hi",
            **per_token,
        )
        for i in range(request.num_rollouts)
    )
    return codec.encode(Group(group_id, rollouts), generation.StreamTrajectoriesResponse)


def encoded_message(group_id):
    """Return an encoded prompt whose width is the length of its group id."""
    return codec.encode(
        EncodedPrompt(group_id, 4, np.ones(len(group_id), np.float32), 3), generation.EncodePromptsResponse
    )


class Scripted:
    """Base of the servicers: a call runs the next entry of the script, or returns a valid answer if there is none."""

    def __init__(self) -> None:
        self.script: list[Callable] = []
        self.requests: list = []
        self.metadata: list[dict] = []
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()

    @contextlib.contextmanager
    def _noting(self, request, context):
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.started.set()
        try:
            yield
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def _scripted(self, request, context):
        with self._noting(request, context):
            if self.script:
                return await self.script.pop(0)(request, context)
        return None

    async def hang(self, request, context):
        """Script entry: never answer."""
        await asyncio.Event().wait()


class Generation(Scripted, GenerationServiceServicer):
    async def StreamTrajectories(self, request, context):
        with self._noting(request, context):
            if self.script:
                async for message in self.script.pop(0)(request, context):
                    yield message
            else:
                for prompt in request.prompts:
                    yield group_message(request, prompt.group_id)

    async def EncodePrompts(self, request, context):
        with self._noting(request, context):
            if self.script:
                async for message in self.script.pop(0)(request, context):
                    yield message
            else:
                for prompt in request.prompts:
                    yield encoded_message(prompt.group_id)

    async def CheckPrompts(self, request, context):
        checks = [PromptCheck(prompt.group_id, len(prompt.text), "") for prompt in request.prompts]
        found = [codec.encode(check, generation.PromptCheck) for check in checks]
        return await self._scripted(request, context) or generation.CheckPromptsResponse(prompts=found)

    async def GetPolicy(self, request, context):
        return await self._scripted(request, context) or generation.GetPolicyResponse(policy_version=3, ready=True)

    async def UpdateWeights(self, requests, context):
        messages = [message async for message in requests]
        answer = await self._scripted(messages, context)
        return answer or generation.UpdateWeightsResponse(policy_version=messages[0].manifest.policy_version)

    def stream(self, *group_ids, then=None):
        """Return a script entry that yields these groups for any request, then awaits `then`."""

        async def entry(request, context):
            for group_id in group_ids:
                if isinstance(request, generation.EncodePromptsRequest):
                    yield encoded_message(group_id)
                else:
                    yield group_message(request, group_id)
            if then is not None:
                await then(request, context)

        return entry


class Value(Scripted, ValueServiceServicer):
    async def EstimateBaselines(self, request, context):
        answer = await self._scripted(request, context)
        return answer or value.EstimateBaselinesResponse(
            groups=[
                value.GroupBaselines(group_id=group.group_id, status=value.ESTIMATE_STATUS_NO_PROBE)
                for group in request.groups
            ]
        )

    async def ScorePrompts(self, request, context):
        answer = await self._scripted(request, context)
        return answer or value.ScorePromptsResponse(
            prompts=[
                value.PromptScore(
                    group_id=prompt.group_id, status=value.ESTIMATE_STATUS_OK, value=0.25 + 0.75 * (i % 2)
                )
                for i, prompt in enumerate(request.prompts)
            ]
        )

    async def PublishLabels(self, request, context):
        answer = await self._scripted(request, context)
        return answer or value.PublishLabelsResponse(num_queued=len(request.groups))

    async def GetProbe(self, request, context):
        answer = await self._scripted(request, context)
        return answer or value.GetProbeResponse(estimator=value.ESTIMATOR_PROBE, num_pending=4)


class Learner(Scripted, LearnerServiceServicer):
    async def SubmitAdvantages(self, requests, context):
        messages = [message async for message in requests]
        return await self._scripted(messages, context) or learner.SubmitAdvantagesResponse(policy_version=9)

    async def GetStatus(self, request, context):
        return await self._scripted(request, context) or learner.GetStatusResponse(state="LEARNER_STATE_IDLE")

    async def ExportModel(self, request, context):
        answer = await self._scripted(request, context)
        return answer or learner.ExportModelResponse(path=f"/exports/{request.name}", policy_version=9)


@pytest.fixture
def failing() -> Callable[..., Callable]:
    """Return a factory of failing script entries. It takes the arguments of `fail`."""

    def make(code, **arguments):
        async def entry(request, context):
            await fail(context, code, **arguments)

        return entry

    return make


@pytest.fixture
def unavailable(failing) -> Callable:
    """Script entry that fails like a draining service."""
    return failing(grpc.StatusCode.UNAVAILABLE, reason="DRAINING")


@pytest.fixture
def unused_port() -> int:
    """Unused port of 127.0.0.1."""
    return free_port()


@pytest.fixture
def generation_service() -> Generation:
    return Generation()


@pytest.fixture
def value_service() -> Value:
    return Value()


@pytest.fixture
def learner_service() -> Learner:
    return Learner()


@pytest.fixture
async def target(generation_service, value_service, learner_service) -> AsyncIterator[str]:
    """Address of a server with all three services."""
    server = grpc.aio.server()
    add_GenerationServiceServicer_to_server(generation_service, server)
    add_ValueServiceServicer_to_server(value_service, server)
    add_LearnerServiceServicer_to_server(learner_service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)
