"""The client of the generation service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

import grpc.aio

from poise_client._client import AsyncClient, encoding, pack
from poise_client._retry import Attempts
from poise_client._status import renumber
from poise_client._weights import WeightPush
from poise_client.codec import (
    decode_encoded_prompt,
    decode_group,
    decode_policy,
    decode_prompt_checks,
    decode_weight_update,
    encode_prompt,
    encode_sampling,
)
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
    """Samples rollouts from one generation replica, and gives it new weights."""

    service = "GenerationService"

    async def stream_trajectories(
        self,
        run_id: str,
        step: int,
        prompts: Sequence[Prompt],
        *,
        num_rollouts: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        return_token_entropies: bool = False,
        min_policy_version: int | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Group, None]:
        """Sample `num_rollouts` responses to each prompt; yield each group once, in order of finishing.

        When the service fails midway, the groups not yet yielded are asked for again. Closing the iterator (leaving an
        `async for` early does not: use `contextlib.aclosing`) cancels what still runs in the service.

        Args:
            run_id: the training run.
            step: step of the run.
            prompts: what to ask; their group ids must differ.
            num_rollouts: responses to each, 1..256.
            sampling: how tokens are drawn.
            return_token_entropies: fill `Rollout.token_entropies`.
            min_policy_version: raise `VersionMismatchError` unless at least this version is served.
            timeout_s: deadline of the whole stream; 30 minutes by default.

        Raises:
            PoiseClientError: see `poise_client.errors`.
        """
        with encoding("request"):
            base = pb.StreamTrajectoriesRequest(
                run_id=run_id,
                step=step,
                num_rollouts=num_rollouts,
                sampling=encode_sampling(sampling),
                return_token_entropies=return_token_entropies,
                min_policy_version=min_policy_version,
            )
        specs = _encode_prompts(prompts)
        attempts = self._attempts(timeout_s, STREAM_TIMEOUT_S)

        def start(part: list[pb.PromptSpec], left_s: float) -> grpc.aio.UnaryStreamCall[Any, Any]:
            request = pb.StreamTrajectoriesRequest(prompts=part)
            request.MergeFrom(base)
            return GenerationServiceStub(self._open()).StreamTrajectories(
                request, timeout=left_s, metadata=self._dialer.metadata
            )

        async with aclosing(self._each_once("StreamTrajectories", specs, attempts, start, decode_group)) as groups:
            async for group in groups:
                yield group

    async def encode_prompts(self, prompts: Sequence[Prompt], *, timeout_s: float | None = None) -> list[EncodedPrompt]:
        """Return each prompt's state, by one pass through the model without sampling, in the order of `prompts`.

        What `AsyncValueClient.score_prompts` values prompts by, before any rollout. When the service fails midway, the
        prompts that it has not answered are asked for again.

        Args:
            prompts: what to encode; their group ids must differ.
            timeout_s: deadline of it all; 5 minutes by default.

        Raises:
            PoiseClientError: see `poise_client.errors`.
        """
        specs = _encode_prompts(prompts)
        attempts = self._attempts(timeout_s, ENCODE_TIMEOUT_S)

        def start(part: list[pb.PromptSpec], left_s: float) -> grpc.aio.UnaryStreamCall[Any, Any]:
            return GenerationServiceStub(self._open()).EncodePrompts(
                pb.EncodePromptsRequest(prompts=part), timeout=left_s, metadata=self._dialer.metadata
            )

        encoded: dict[str, EncodedPrompt] = {}
        answers = self._each_once("EncodePrompts", specs, attempts, start, decode_encoded_prompt)
        async with aclosing(answers):
            async for prompt in answers:
                encoded[prompt.group_id] = prompt
        return [encoded[spec.group_id] for spec in specs]

    async def check_prompts(self, prompts: Sequence[Prompt], *, timeout_s: float | None = None) -> list[PromptCheck]:
        """Return how many tokens each prompt has, or why it cannot be sampled, in the order of `prompts`.

        Nothing passes through the model. Compare the tokens, and those of a response, with `Policy.max_model_len`.

        Args:
            prompts: what to check; their group ids must differ.
            timeout_s: deadline of it all; 5 minutes by default.

        Raises:
            PoiseClientError: see `poise_client.errors`.
        """
        specs = _encode_prompts(prompts)
        attempts = self._attempts(timeout_s, CHECK_TIMEOUT_S)
        checks: list[PromptCheck] = []
        for part in pack(specs):
            request = pb.CheckPromptsRequest(prompts=[specs[i] for i in part])
            try:
                checks += await self._call(
                    "CheckPrompts", attempts, partial(self._check, request), decode_prompt_checks
                )
            except PoiseClientError as error:
                renumber(error, "prompts", part)
                raise
        return checks

    def _check(self, request: pb.CheckPromptsRequest, left_s: float) -> grpc.aio.UnaryUnaryCall[Any, Any]:
        return GenerationServiceStub(self._open()).CheckPrompts(request, timeout=left_s, metadata=self._dialer.metadata)

    async def _each_once(
        self,
        method: str,
        specs: Sequence[pb.PromptSpec],
        attempts: Attempts,
        start: Callable[[list[pb.PromptSpec], float], grpc.aio.UnaryStreamCall[Any, M]],
        decode: Callable[[M], T],
    ) -> AsyncGenerator[T, None]:
        """Yield the answer to each prompt once, over as many attempts as it takes."""
        for part in pack(specs):
            unfinished = {specs[i].group_id: i for i in part}
            while unfinished:
                indices = list(unfinished.values())
                asked = [specs[i] for i in indices]
                try:
                    async with aclosing(self._attempt(method, asked, unfinished, attempts, start, decode)) as answers:
                        async for answer in answers:
                            yield answer
                except PoiseClientError as error:
                    renumber(error, "prompts", indices)
                    await attempts.wait_after(error)

    async def _attempt(
        self,
        method: str,
        asked: list[pb.PromptSpec],
        unfinished: dict[str, int],
        attempts: Attempts,
        start: Callable[[list[pb.PromptSpec], float], grpc.aio.UnaryStreamCall[Any, M]],
        decode: Callable[[M], T],
    ) -> AsyncGenerator[T, None]:
        """Yield the answers of one attempt, crossing their prompts off; raise unless none is left."""
        with self._translated(method):
            call = start(asked, attempts.remaining_s())
        try:
            while True:
                with self._translated(method):
                    message: Any = await call.read()
                    if not message:  # gRPC's end of the stream; a message is true, even an empty one
                        break
                    answer = decode(message)
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
        """Ask which policy is served, and what the engine can do."""
        return await self._call(
            "GetPolicy",
            self._attempts(timeout_s, UNARY_TIMEOUT_S),
            lambda left_s: GenerationServiceStub(self._open()).GetPolicy(
                pb.GetPolicyRequest(), timeout=left_s, metadata=self._dialer.metadata
            ),
            decode_policy,
        )

    async def update_weights(
        self,
        *,
        lineage_id: str,
        policy_version: int,
        weights: Mapping[str, WeightArray],
        timeout_s: float | None = None,
    ) -> WeightUpdate:
        """Serve these parameters as `policy_version`: all of them, or none when anything fails.

        Args:
            lineage_id: the learner that numbers the versions.
            policy_version: must exceed the one served, within a lineage.
            weights: every parameter by its Hugging Face name, tied ones once. Must not change during the call.
            timeout_s: deadline; 5 minutes by default.

        Raises:
            ConflictError: the version is taken by other weights, or lower than the one served.
            PoiseClientError: see `poise_client.errors`.
        """
        attempts = self._attempts(timeout_s, UPDATE_TIMEOUT_S)
        with encoding("weights"):
            push = await asyncio.to_thread(WeightPush.prepare, lineage_id, policy_version, weights)
        return await self._push(push, attempts)

    async def push_weights(self, push: WeightPush, *, timeout_s: float | None = None) -> WeightUpdate:
        """Serve a version that was made ready before: for several replicas, deltas, or a body in a shared file.

        Args:
            push: which parameters, and how they travel.
            timeout_s: deadline; 5 minutes by default.

        Raises:
            VersionMismatchError: it is a delta, and its base is not what the replica serves and keeps.
            ConflictError: the version is taken by other weights, or lower than the one served.
            PoiseClientError: see `poise_client.errors`.
        """
        return await self._push(push, self._attempts(timeout_s, UPDATE_TIMEOUT_S))

    async def _push(self, push: WeightPush, attempts: Attempts) -> WeightUpdate:
        return await self._call(
            "UpdateWeights",
            attempts,
            lambda left_s: GenerationServiceStub(self._open()).UpdateWeights(
                push.messages(), timeout=left_s, metadata=self._dialer.metadata
            ),
            decode_weight_update,
        )


def _encode_prompts(prompts: Sequence[Prompt]) -> list[pb.PromptSpec]:
    specs = []
    for i, prompt in enumerate(prompts):
        with encoding(f"prompts[{i}]"):
            specs.append(encode_prompt(prompt, f"prompts[{i}]"))
    _refuse_duplicates([spec.group_id for spec in specs])
    return specs


def _refuse_duplicates(group_ids: Sequence[str]) -> None:
    seen: set[str] = set()
    violations = []
    for i, group_id in enumerate(group_ids):
        if group_id in seen:
            violations.append((f"prompts[{i}].group_id", f"{group_id!r} names an earlier prompt too; required: unique"))
        seen.add(group_id)
    if violations:
        raise InvalidRequestError("cannot be sent", violations=violations)
