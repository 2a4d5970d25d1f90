"""The async client of the generation service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

import grpc.aio

from poise_client._transport.client import AsyncClient, encode_each, encoding, pack
from poise_client._transport.retry import Attempts
from poise_client._transport.status import renumber
from poise_client._weights import WeightPush
from poise_client.codec import decode, encode
from poise_client.errors import InvalidRequestError, PoiseClientError, UnavailableError
from poise_client.types import EncodedPrompt, Group, Policy, Prompt, PromptCheck, Sampling, WeightArray, WeightUpdate
from poise_proto.v1 import generation_pb2 as pb
from poise_proto.v1.generation_pb2_grpc import GenerationServiceStub

STREAM_TIMEOUT_S = 1800.0
UPDATE_TIMEOUT_S = 300.0
ENCODE_TIMEOUT_S = 300.0
CHECK_TIMEOUT_S = 300.0
UNARY_TIMEOUT_S = 30.0

T = TypeVar("T")
M = TypeVar("M", pb.StreamTrajectoriesResponse, pb.EncodePromptsResponse)


class AsyncGenerationClient(AsyncClient):
    """Samples rollouts from one generation replica and pushes weights to it."""

    service = "GenerationService"
    _stub = GenerationServiceStub

    async def stream_trajectories(
        self,
        run_id: str,
        step: int,
        prompts: Sequence[Prompt],
        *,
        num_rollouts: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        min_policy_version: int | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Group, None]:
        """Sample `num_rollouts` responses of each prompt; yield each group once, when it is complete.

        If the service fails midway, the remaining groups are requested again. Closing the iterator cancels the
        unfinished rollouts in the service.

        Args:
            run_id: the training run.
            step: step of the run.
            prompts: prompts with different group ids.
            num_rollouts: responses of each prompt, 1 to 256.
            sampling: how tokens are sampled.
            min_policy_version: raise `VersionMismatchError` if the replica serves an older version.
            timeout_s: deadline of the whole stream; 30 minutes by default.

        Raises:
            PoiseClientError: see `poise_client.errors`.
        """
        with encoding("request"):
            base = pb.StreamTrajectoriesRequest(
                run_id=run_id,
                step=step,
                num_rollouts=num_rollouts,
                sampling=encode(sampling, pb.SamplingParams),
                min_policy_version=min_policy_version,
            )
        specs = _encode_prompts(prompts)
        attempts = self._attempts(timeout_s, STREAM_TIMEOUT_S)

        def start(part: list[pb.PromptSpec], left_s: float) -> grpc.aio.UnaryStreamCall[Any, Any]:
            request = pb.StreamTrajectoriesRequest(prompts=part)
            request.MergeFrom(base)
            return self._stub(self._open()).StreamTrajectories(request, timeout=left_s, metadata=self._dialer.metadata)

        async with aclosing(self._each_once("StreamTrajectories", specs, attempts, start, Group)) as groups:
            async for group in groups:
                yield group

    async def encode_prompts(self, prompts: Sequence[Prompt], *, timeout_s: float | None = None) -> list[EncodedPrompt]:
        """Return the hidden state of each prompt, in the order of `prompts`.

        Each prompt passes through the model once, without sampling. Use it for `score_prompts` of the value client. If
        the service fails midway, the remaining prompts are requested again.

        Args:
            prompts: prompts with different group ids.
            timeout_s: deadline; 5 minutes by default.

        Raises:
            PoiseClientError: see `poise_client.errors`.
        """
        specs = _encode_prompts(prompts)
        attempts = self._attempts(timeout_s, ENCODE_TIMEOUT_S)

        def start(part: list[pb.PromptSpec], left_s: float) -> grpc.aio.UnaryStreamCall[Any, Any]:
            return self._stub(self._open()).EncodePrompts(
                pb.EncodePromptsRequest(prompts=part), timeout=left_s, metadata=self._dialer.metadata
            )

        encoded: dict[str, EncodedPrompt] = {}
        answers = self._each_once("EncodePrompts", specs, attempts, start, EncodedPrompt)
        async with aclosing(answers):
            async for prompt in answers:
                encoded[prompt.group_id] = prompt
        return [encoded[spec.group_id] for spec in specs]

    async def check_prompts(self, prompts: Sequence[Prompt], *, timeout_s: float | None = None) -> list[PromptCheck]:
        """Return the number of tokens of each prompt, or why it cannot be sampled, in the order of `prompts`.

        The model does not run. Compare the number of tokens with `Policy.max_model_len`.

        Args:
            prompts: prompts with different group ids.
            timeout_s: deadline; 5 minutes by default.

        Raises:
            PoiseClientError: see `poise_client.errors`.
        """
        checks = await self._call_in_parts(
            "CheckPrompts",
            self._attempts(timeout_s, CHECK_TIMEOUT_S),
            "prompts",
            _encode_prompts(prompts),
            lambda part: pb.CheckPromptsRequest(prompts=part),
            lambda request, response: [decode(check, PromptCheck) for check in response.prompts],
        )
        return [check for part in checks for check in part]

    async def _each_once(
        self,
        method: str,
        specs: Sequence[pb.PromptSpec],
        attempts: Attempts,
        start: Callable[[list[pb.PromptSpec], float], grpc.aio.UnaryStreamCall[Any, M]],
        kind: type[T],
    ) -> AsyncGenerator[T, None]:
        """Yield one answer for each prompt, over several attempts if necessary."""
        for part in pack(specs):
            unfinished = {specs[i].group_id: i for i in part}
            while unfinished:
                indices = list(unfinished.values())
                requested = [specs[i] for i in indices]
                try:
                    async with aclosing(self._attempt(method, requested, unfinished, attempts, start, kind)) as answers:
                        async for answer in answers:
                            yield answer
                except PoiseClientError as error:
                    renumber(error, "prompts", indices)
                    await attempts.wait_after(error)

    async def _attempt(
        self,
        method: str,
        requested: list[pb.PromptSpec],
        unfinished: dict[str, int],
        attempts: Attempts,
        start: Callable[[list[pb.PromptSpec], float], grpc.aio.UnaryStreamCall[Any, M]],
        kind: type[T],
    ) -> AsyncGenerator[T, None]:
        """Yield the answers of one attempt and remove their prompts from `unfinished`. Raise if a prompt remains."""
        with self._translated(method):
            call = start(requested, attempts.remaining_s())
        try:
            while True:
                with self._translated(method):
                    message: Any = await call.read()
                    if not message:  # end of the stream: gRPC returns a false value; messages are true, even empty ones
                        break
                    answer = decode(message, kind)
                if unfinished.pop(message.group_id, None) is not None:
                    attempts.progressed()
                    yield answer
        finally:
            call.cancel()
        if unfinished:
            raise UnavailableError(
                f"the stream ended with {len(unfinished)} prompts missing",
                retryable=True,
                call=f"{self.service}.{method} at {self.target}",
            )

    async def get_policy(self, *, timeout_s: float | None = None) -> Policy:
        """Return the served policy and the properties of the engine. `timeout_s` is 30 s by default."""
        attempts = self._attempts(timeout_s, UNARY_TIMEOUT_S)
        return await self._call("GetPolicy", attempts, pb.GetPolicyRequest(), partial(decode, kind=Policy))

    async def update_weights(
        self,
        *,
        lineage_id: str,
        policy_version: int,
        weights: Mapping[str, WeightArray],
        timeout_s: float | None = None,
    ) -> WeightUpdate:
        """Replace the served weights. After a failure, the replica still serves the old version.

        Args:
            lineage_id: id of the learner that numbers the versions.
            policy_version: must exceed the served version of the same lineage.
            weights: every parameter by its Hugging Face name, tied ones once. Do not change them during the call.
            timeout_s: deadline; 5 minutes by default.

        Raises:
            ConflictError: the replica has other weights of this version, or serves a newer version.
            PoiseClientError: see `poise_client.errors`.
        """
        attempts = self._attempts(timeout_s, UPDATE_TIMEOUT_S)
        with encoding("weights"):
            push = await asyncio.to_thread(WeightPush.prepare, lineage_id, policy_version, weights)
        return await self._push(push, attempts)

    async def push_weights(self, push: WeightPush, *, timeout_s: float | None = None) -> WeightUpdate:
        """Replace the served weights with a prepared push. Use it for several replicas, deltas and shared files.

        Args:
            push: the parameters and their transfer method.
            timeout_s: deadline; 5 minutes by default.

        Raises:
            VersionMismatchError: the push is a delta, and the replica does not serve and keep its base.
            ConflictError: the replica has other weights of this version, or serves a newer version.
            PoiseClientError: see `poise_client.errors`.
        """
        return await self._push(push, self._attempts(timeout_s, UPDATE_TIMEOUT_S))

    async def _push(self, push: WeightPush, attempts: Attempts) -> WeightUpdate:
        return await self._call("UpdateWeights", attempts, push.messages, partial(decode, kind=WeightUpdate))


def _encode_prompts(prompts: Sequence[Prompt]) -> list[pb.PromptSpec]:
    specs = encode_each(prompts, pb.PromptSpec, "prompts")
    _reject_duplicates([spec.group_id for spec in specs])
    return specs


def _reject_duplicates(group_ids: Sequence[str]) -> None:
    seen: set[str] = set()
    violations = []
    for i, group_id in enumerate(group_ids):
        if group_id in seen:
            violations.append(
                (f"prompts[{i}].group_id", f"{group_id!r} is the group_id of an earlier prompt; required: unique")
            )
        seen.add(group_id)
    if violations:
        raise InvalidRequestError("cannot be sent", violations=violations)
