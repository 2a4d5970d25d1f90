"""The gRPC servicer: validates requests and translates between protobuf, the sampler and the push receiver."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager

import grpc.aio
import numpy as np

from poise.errors import BackendDown, Draining, PoiseError, VersionMismatch
from poise.generation.config import GenerationConfig
from poise.generation.engine import Engine
from poise.generation.metrics import GenerationMetrics
from poise.generation.sampler import Sampler
from poise.generation.served_policy import ServedPolicy
from poise.generation.weights.receiver import PushReceiver
from poise.runtime.rpc.validation import Violations, quoted
from poise_client.codec import (
    CodecError,
    decode,
    encode,
)
from poise_client.types import Policy, Prompt, Sampling
from poise_proto.v1 import generation_pb2 as pb
from poise_proto.v1 import generation_pb2_grpc

logger = logging.getLogger(__name__)

MAX_PROMPTS = 4096
MAX_TURNS = 32768
"""Limit on the chat messages of one request, over all its prompts."""
MAX_ROLLOUTS = 256
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MIN_TEMPERATURE, MAX_TEMPERATURE = float(np.float32(0.01)), 100.0
"""Logits overflow below the minimum, which is vLLM's too. Rounded to float32, the field's type. 0 means greedy."""

Context = grpc.aio.ServicerContext[object, object]


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Samples rollouts and receives pushes."""

    def __init__(
        self,
        engine: Engine,
        config: GenerationConfig,
        metrics: GenerationMetrics,
        not_ready_reason: Callable[[], str],
    ) -> None:
        """`not_ready_reason` returns why new rollouts are rejected now, or an empty string."""
        self._engine = engine
        self._metrics = metrics
        self.sampler = Sampler(engine, config)
        self.receiver = PushReceiver(engine, config, metrics)
        self.instance_id = uuid.uuid4().hex
        self._not_ready_reason = not_ready_reason

    async def StreamTrajectories(  # noqa: N802
        self, request: pb.StreamTrajectoriesRequest, context: Context
    ) -> AsyncIterator[pb.StreamTrajectoriesResponse]:
        """See generation.proto."""
        self._check_ready()
        prompts, sampling, num_rollouts = _read_request(request, self._engine.info.vocabulary_size)
        if request.HasField("min_policy_version") and self.policy.policy_version < request.min_policy_version:
            raise VersionMismatch(
                f"min_policy_version is {request.min_policy_version}; version {self.policy.policy_version} is served",
                remedy="Wait for the learner's push and try again.",
            )
        groups = self.sampler.sample(request.run_id, request.step, prompts, num_rollouts, sampling)
        try:
            with self._engine_death_as_unavailable():
                async for group in groups:
                    self._metrics.observe(group)
                    yield encode(group, pb.StreamTrajectoriesResponse)
        finally:
            await groups.aclose()

    async def EncodePrompts(  # noqa: N802
        self, request: pb.EncodePromptsRequest, context: Context
    ) -> AsyncIterator[pb.EncodePromptsResponse]:
        """See generation.proto."""
        self._check_ready()
        wrong = Violations()
        prompts = _read_prompts(request.prompts, wrong)
        wrong.raise_if_any()
        encoded = self.sampler.encode(prompts)
        try:
            with self._engine_death_as_unavailable():
                async for prompt in encoded:
                    yield encode(prompt, pb.EncodePromptsResponse)
        finally:
            await encoded.aclose()

    async def CheckPrompts(  # noqa: N802
        self, request: pb.CheckPromptsRequest, context: Context
    ) -> pb.CheckPromptsResponse:
        """See generation.proto."""
        wrong = Violations()
        prompts = _read_prompts(request.prompts, wrong)
        wrong.raise_if_any()
        checks = await self.sampler.check(prompts)
        return pb.CheckPromptsResponse(prompts=[encode(check, pb.PromptCheck) for check in checks])

    async def UpdateWeights(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.UpdateWeightsRequest], context: Context
    ) -> pb.UpdateWeightsResponse:
        """See generation.proto."""
        with self._engine_death_as_unavailable():
            return encode(await self.receiver.receive(request_iterator), pb.UpdateWeightsResponse)

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: Context) -> pb.GetPolicyResponse:  # noqa: N802
        """See generation.proto."""
        info = self._engine.info
        not_ready_reason = self._not_ready_reason()
        return encode(
            Policy(
                instance_id=self.instance_id,
                lineage_id=self.policy.lineage_id,
                policy_version=self.policy.policy_version,
                digest=self.policy.digest,
                ready=not not_ready_reason,
                not_ready_reason=not_ready_reason,
                engine=info.engine,
                model=info.model,
                hidden_size=info.hidden_size,
                feature_layer=info.feature_layer,
                max_model_len=info.max_model_len,
                num_running=self.sampler.num_running,
                keeps_base=self.receiver.keeps_base,
                process_group_backend=self._engine.process_group_backend,
                tokenizer_digest=info.tokenizer_digest,
                vocabulary_size=info.vocabulary_size,
            ),
            pb.GetPolicyResponse,
        )

    @property
    def policy(self) -> ServedPolicy:
        """The version being served."""
        return self.receiver.policy

    def _check_ready(self) -> None:
        if reason := self._not_ready_reason():
            raise Draining(reason, retry_after_s=0.5)

    @contextmanager
    def _engine_death_as_unavailable(self) -> Iterator[None]:
        """Convert exceptions to a retryable error if the engine died during the call. Let all others pass."""
        try:
            yield
        except PoiseError:
            raise
        except Exception as error:
            if self._engine.is_alive():
                raise
            raise BackendDown("the engine died; the process restarts", retry_after_s=1.0) from error


def _read_request(request: pb.StreamTrajectoriesRequest, vocabulary_size: int) -> tuple[list[Prompt], Sampling, int]:
    wrong = Violations()
    wrong.identifier("run_id", request.run_id)
    num_rollouts = request.num_rollouts or 1
    wrong.check(num_rollouts <= MAX_ROLLOUTS, "num_rollouts", f"is {num_rollouts}; required: 1 to {MAX_ROLLOUTS}")
    wrong.check_count("sampling.stop", len(request.sampling.stop), MAX_STOPS)
    prompts = _read_prompts(request.prompts, wrong)
    sampling = decode(request.sampling, Sampling)
    _check_sampling(sampling, vocabulary_size, wrong)
    wrong.raise_if_any()
    return prompts, sampling, num_rollouts


def _read_prompts(specs: Sequence[pb.PromptSpec], wrong: Violations) -> list[Prompt]:
    wrong.check_count("prompts", len(specs), MAX_PROMPTS, at_least=1)
    wrong.check_count("prompts.chat.messages", sum(len(spec.chat.messages) for spec in specs), MAX_TURNS)
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for index, spec in enumerate(specs):
        path = f"prompts[{index}]"
        wrong.identifier(f"{path}.group_id", spec.group_id)
        if spec.group_id in seen:
            wrong.add(
                f"{path}.group_id", f"is {quoted(spec.group_id)}, which an earlier prompt has too; required: unique"
            )
        seen.add(spec.group_id)
        try:
            prompts.append(decode(spec, Prompt, path))
        except CodecError as error:
            wrong.add(error.field, error.description)
        if wrong.is_full:
            break
    return prompts


def _check_sampling(sampling: Sampling, vocabulary_size: int, wrong: Violations) -> None:
    temperature, top_p = sampling.temperature, sampling.top_p
    wrong.check(
        temperature == 0 or MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE,
        "sampling.temperature",
        f"is {temperature:g}; required: {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}, or 0 (greedy)",
    )
    wrong.check(0 < top_p <= 1, "sampling.top_p", f"is {top_p:g}; required: above 0, at most 1")
    for index, stop in enumerate(sampling.stop):
        wrong.check(
            1 <= len(stop) <= MAX_STOP_CHARS,
            f"sampling.stop[{index}]",
            f"has {len(stop)} characters; required: 1 to {MAX_STOP_CHARS}",
        )
    token_ids = sampling.stop_token_ids
    wrong.check(
        len(token_ids) <= MAX_STOPS, "sampling.stop_token_ids", f"has {len(token_ids)}; required: at most {MAX_STOPS}"
    )
    for index, token in enumerate(token_ids[:MAX_STOPS]):
        wrong.check(
            token < vocabulary_size,
            f"sampling.stop_token_ids[{index}]",
            f"is {token}; required: 0 to {vocabulary_size - 1}, the model's vocabulary",
        )
