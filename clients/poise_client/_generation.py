"""The client of the generation service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from poise_client._client import AsyncClient, encoding, pack
from poise_client._retry import Attempts
from poise_client._status import renumber
from poise_client._weights import WeightPush
from poise_client.codec import decode_group, decode_policy, decode_weight_update, encode_prompt, encode_sampling
from poise_client.errors import InvalidRequestError, PoiseClientError, UnavailableError
from poise_client.types import Group, Policy, Prompt, Sampling, WeightArray, WeightUpdate
from poise_proto.v1 import generation_pb2 as pb
from poise_proto.v1.generation_pb2_grpc import GenerationServiceStub

STREAM_TIMEOUT_S = 1800.0
UPDATE_TIMEOUT_S = 300.0
UNARY_TIMEOUT_S = 30.0


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
        specs = []
        for i, prompt in enumerate(prompts):
            with encoding(f"prompts[{i}]"):
                specs.append(encode_prompt(prompt, f"prompts[{i}]"))
        _refuse_duplicates([spec.group_id for spec in specs])
        attempts = self._attempts(timeout_s, STREAM_TIMEOUT_S)
        for part in pack(specs):
            unfinished = {specs[i].group_id: i for i in part}
            while unfinished:
                indices = list(unfinished.values())
                request = pb.StreamTrajectoriesRequest(prompts=[specs[i] for i in indices])
                request.MergeFrom(base)
                try:
                    async with aclosing(self._stream_once(request, unfinished, attempts)) as groups:
                        async for group in groups:
                            yield group
                except PoiseClientError as error:
                    renumber(error, "prompts", indices)
                    await attempts.wait_after(error)

    async def _stream_once(
        self, request: pb.StreamTrajectoriesRequest, unfinished: dict[str, int], attempts: Attempts
    ) -> AsyncGenerator[Group, None]:
        """Yield the groups of one attempt, crossing them off; raise unless none is left."""
        method = "StreamTrajectories"
        with self._translated(method):
            call = GenerationServiceStub(self._open()).StreamTrajectories(
                request, timeout=attempts.remaining_s(), metadata=self._dialer.metadata
            )
        try:
            while True:
                with self._translated(method):
                    message = await call.read()
                    if not isinstance(message, pb.StreamTrajectoriesResponse):
                        break
                    group = decode_group(message)
                if unfinished.pop(group.group_id, None) is not None:
                    attempts.progressed()
                    yield group
        finally:
            call.cancel()
        if unfinished:
            raise UnavailableError(
                f"the stream ended with {len(unfinished)} groups missing",
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


def _refuse_duplicates(group_ids: Sequence[str]) -> None:
    seen: set[str] = set()
    violations = []
    for i, group_id in enumerate(group_ids):
        if group_id in seen:
            violations.append((f"prompts[{i}].group_id", f"{group_id!r} names an earlier prompt too; required: unique"))
        seen.add(group_id)
    if violations:
        raise InvalidRequestError("cannot be sent", violations=violations)
