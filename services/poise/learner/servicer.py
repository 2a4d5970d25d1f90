"""LearnerService: validates requests, translates messages, and runs batches through the core one at a time."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc.aio
import numpy as np

from poise.errors import BackendDown, Draining, InvalidRequest, PoiseError, Starting
from poise.learner.config import LearnerConfig
from poise.learner.core import LearnerCore
from poise.learner.metrics import LearnerMetrics
from poise.learner.publishing.publisher import Publisher
from poise.runtime.logging import log_ids
from poise.runtime.rpc.request_stream import read_rest
from poise.runtime.rpc.validation import Violations
from poise_client.codec import CodecError, decode, decode_fields, encode
from poise_client.types import Batch, LearnerState, LearnerStatus, ModelExport, Rollout, StepResult
from poise_proto.v1 import learner_pb2 as pb
from poise_proto.v1 import learner_pb2_grpc

MAX_ROLLOUTS = 65536
MAX_BATCH_TOKENS = 64 * 2**20
MIN_LOGPROB, MAX_LOGPROB = -80.0, 1e-3
"""The maximum is above 0 because engines round. The minimum keeps importance weights, exp(difference of two
log-probabilities), finite in float32. Tokens with a probability below e^-80 are never sampled."""
MAX_ADVANTAGE = 1e4
"""Largest magnitude of advantages and rewards. It keeps squares of losses and gradients finite in float32."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.0099, 100.0
"""Allowed sampling temperatures. The minimum is 0.01, less a margin for rounding."""

_CHECK_DISK_EVERY_S = 2.0

T = TypeVar("T")

Context = grpc.aio.ServicerContext[object, object]


class LearnerServicer(learner_pb2_grpc.LearnerServiceServicer):
    """Rejects all calls until `recover` has run, and batches while paused or closed."""

    def __init__(
        self,
        config: LearnerConfig,
        core: LearnerCore,
        publisher: Publisher,
        metrics: LearnerMetrics,
        fail: Callable[[str], None],
    ) -> None:
        self._config = config
        self._core = core
        self._publisher = publisher
        self._metrics = metrics
        self._fail = fail
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="learner")
        self._batches = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._exports: dict[str, asyncio.Task[ModelExport]] = {}
        """Exports being written, or waiting for the current batch, by name."""
        self._activity: LearnerState = "recovering"
        self._watchers: list[asyncio.Task[None]] = []
        self._closed = False
        self._is_stopped = False
        self.paused = False

    @property
    def not_ready_reason(self) -> str:
        """Why batches are rejected; empty while they are accepted."""
        if self._closed:
            return "the learner is shutting down"
        if self._activity == "recovering":
            return self._core.startup.stage
        if self._core.failure:
            return self._core.failure
        return "paused; resume with POST /admin/v1/resume" if self.paused else ""

    @property
    def starting_s(self) -> float | None:
        """Seconds in the current startup stage; None once started."""
        return self._core.startup.elapsed_s if self._activity == "recovering" else None

    async def recover(self) -> None:
        """Recover the core, publish its version to the replicas, and accept calls."""
        await self.on_thread(self._core.recover)
        assert self._core.published is not None  # noqa: S101 (recovered)
        self._metrics.recovered(self._core.published.policy_version)
        self._publisher.start()
        self._start(self._publisher.publish(self._core.published))
        self._activity = "idle"
        self._watchers = [self._start(self._watch_disk())]
        if self._core.trainer.has_other_ranks:
            self._watchers += [self._start(self._ping_ranks()), self._start(self._touch())]

    async def _watch_disk(self) -> None:
        """Check whether a full or broken disk can be written again, even if no batch is submitted."""
        while True:
            await asyncio.sleep(_CHECK_DISK_EVERY_S)
            if self._core.disk_error and self._activity == "idle":
                await self.on_thread(self._core.check_disk)

    async def close(self) -> None:
        """Reject further batches, and wait for the current one."""
        self._closed = True
        self._core.stop_waiting()
        async with self._batches:
            pass

    async def stop(self) -> None:
        """Wait for the current work, which may write to the state folder; then unlock the folder."""
        self._core.stop_waiting()
        for task in self._watchers:
            task.cancel()
        closing = asyncio.get_running_loop().run_in_executor(self._thread, self._core.close)
        self._is_stopped = True
        try:
            await closing
        finally:
            self._thread.shutdown()

    async def _ping_ranks(self) -> None:
        """Detect ranks that hang between batches. Heartbeats detect dead ones."""
        while not self._core.failure:
            await asyncio.sleep(self._config.rank_timeout_s / 4)
            with contextlib.suppress(BackendDown):  # its failure ends the service
                await self.on_thread(self._core.ping)

    async def _touch(self) -> None:
        while True:
            self._core.trainer.touch()
            await asyncio.sleep(1.0)

    async def on_thread(self, work: Callable[[], T]) -> T:
        """Run work on the core's thread, one call at a time, in the caller's logging and tracing context.

        Raises:
            Draining: the core is closed.
        """
        if self._is_stopped:
            raise Draining("the learner is shutting down", retry_after_s=1.0)
        context = contextvars.copy_context()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, context.run, work)
        finally:
            if self._core.failure:
                self._fail(self._core.failure)

    async def SubmitAdvantages(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.SubmitAdvantagesRequest], context: Context
    ) -> pb.SubmitAdvantagesResponse:
        """See learner.proto."""
        try:
            self._check_accepting()
            batch = await self._read_batch(request_iterator)
        except PoiseError:
            await read_rest(request_iterator)
            raise
        # Training continues if the client disconnects; a resubmission gets the answer.
        with log_ids(run=batch.run_id, batch=batch.batch_id, step=batch.step):
            result = await asyncio.shield(self._start(self._step(batch)))
            return encode(result, pb.SubmitAdvantagesResponse)

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:  # noqa: N802
        """See learner.proto."""
        return encode(self.status(), pb.GetStatusResponse)

    async def ExportModel(self, request: pb.ExportModelRequest, context: Context) -> pb.ExportModelResponse:  # noqa: N802
        """See learner.proto."""
        wrong = Violations()
        wrong.folder_name("name", request.name)
        wrong.raise_if_any()
        if self._core.published is None:
            raise self._starting()
        if request.check_only:
            checked = await self.on_thread(lambda: self._core.check_export(request.name))
            return encode(checked, pb.ExportModelResponse)
        exporting = self._exports.get(request.name)
        if exporting is None:  # otherwise join the running one: no batch can run in between
            exporting = self._exports[request.name] = self._start(self._export(request.name))
        return encode(await asyncio.shield(exporting), pb.ExportModelResponse)

    async def _export(self, name: str) -> ModelExport:
        try:
            return await self.on_thread(lambda: self._core.export(name))
        finally:
            del self._exports[name]
            if self._core.failure:
                self._fail(self._core.failure)

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a task to its end even if nothing awaits it. The event loop keeps only weak references."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def status(self) -> LearnerStatus:
        """Return the answer to GetStatus. Raises `Starting` until recovered."""
        published = self._core.published
        if published is None:
            raise self._starting()
        progress = self._core.progress
        return LearnerStatus(
            lineage_id=published.lineage_id,
            policy_version=published.policy_version,
            checkpoint_version=self._core.checkpoint_version,
            state="paused" if self.paused and self._activity == "idle" else self._activity,
            num_batches=progress.num_batches,
            num_rollouts=progress.num_rollouts,
            num_rejected=progress.num_rejected,
            model=self._config.model,
            max_staleness=self._config.max_staleness,
            replicas=self._publisher.results,
            digest=published.digest,
            last_batch_id=progress.last_batch_id,
            has_critic=self._config.critic is not None,
            loss_aggregation=self._config.loss.aggregation,
        )

    def _starting(self) -> Starting:
        stage = self._core.startup.stage
        return self._core.startup.error("the learner is " if stage == "recovering" else "the learner is recovering: ")

    def _check_accepting(self) -> None:
        if self._activity == "recovering" and not self._closed:
            raise self._starting()
        if self.not_ready_reason:
            raise Draining(self.not_ready_reason, retry_after_s=1.0)

    async def _step(self, batch: Batch) -> StepResult:
        async with self._batches:
            self._check_accepting()
            self._activity = "training"
            began = time.monotonic()
            try:
                answer, duplicate = await self.on_thread(lambda: self._core.submit(batch))
                self._activity = "publishing"
                started = time.monotonic()
                published = self._core.published
                assert published is not None  # noqa: S101 (recovered)
                await self._publisher.publish(published)  # after a stored answer too: replicas may be behind it
                publish_s = time.monotonic() - started
            finally:
                self._activity = "idle"
        metrics = answer.metrics if duplicate else dataclasses.replace(answer.metrics, publish_s=publish_s)
        result = StepResult(answer.policy_version, duplicate, metrics, answer.rejected, self._publisher.results)
        self._metrics.observe(result, batch.run_id, began)
        return result

    async def _read_batch(self, requests: AsyncIterator[pb.SubmitAdvantagesRequest]) -> Batch:
        first = await anext(requests, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidRequest.field("part", "the first message of a batch must be `header`")
        header = first.header
        batch = decode_fields(header, Batch, "header", rollouts=())
        _check_header(batch, header.num_rollouts)
        wrong = Violations()
        rollouts: list[Rollout] = []
        index = num_tokens = 0
        async for message in requests:
            path = f"rollouts[{index}]"
            if message.WhichOneof("part") != "rollout":
                raise InvalidRequest.field("part", "only rollouts may follow `header`")
            if index >= header.num_rollouts:
                raise InvalidRequest.field(
                    "header.num_rollouts", f"is {header.num_rollouts}, but more rollouts were sent"
                )
            num_spans = len(message.rollout.version_spans)
            try:
                if num_spans > self._core.trainer.max_tokens:
                    raise CodecError(
                        f"{path}.version_spans", f"has {num_spans} spans; allowed: at most one for each response token"
                    )
                rollout = decode(message.rollout, Rollout, path)
            except CodecError as error:
                wrong.add(error.field, error.description)
            else:
                num_tokens += rollout.prompt_token_ids.size + rollout.token_ids.size
                self._check_rollout(rollout, path, wrong)
                rollouts.append(rollout)
            if wrong.is_full:
                raise wrong.error()
            if num_tokens > MAX_BATCH_TOKENS:
                raise InvalidRequest.field(
                    "rollouts", f"have more than {MAX_BATCH_TOKENS} tokens; send smaller batches"
                )
            index += 1
        wrong.check(
            index == header.num_rollouts,
            "header.num_rollouts",
            f"is {header.num_rollouts}, but {index} rollouts were sent. Nothing was trained on; send the batch again",
        )
        wrong.raise_if_any()
        return dataclasses.replace(batch, rollouts=tuple(rollouts))

    def _check_rollout(self, rollout: Rollout, path: str, wrong: Violations) -> None:
        num_prompt, num_response = rollout.prompt_token_ids.size, rollout.token_ids.size
        wrong.identifier(f"{path}.id.run_id", rollout.id.run_id)
        wrong.identifier(f"{path}.id.group_id", rollout.id.group_id)
        self._check_advantage_or_reward(rollout, path, wrong)
        limit, vocabulary_size = self._core.trainer.max_tokens, self._core.trainer.vocabulary_size
        for name, token_ids in (("prompt_token_ids", rollout.prompt_token_ids), ("token_ids", rollout.token_ids)):
            field = f"{path}.{name}"
            if wrong.check(token_ids.size > 0, field, "is empty; required: at least one token"):
                inside = int(token_ids.min()) >= 0 and int(token_ids.max()) < vocabulary_size
                wrong.check(
                    inside, field, f"has ids outside the model's vocabulary; allowed: 0 to {vocabulary_size - 1}"
                )
        wrong.check(
            num_prompt + num_response <= limit,
            f"{path}.token_ids",
            f"prompt and response have {num_prompt + num_response} tokens; the model allows {limit}",
        )
        are_possible = bool(((rollout.logprobs >= MIN_LOGPROB) & (rollout.logprobs <= MAX_LOGPROB)).all())
        wrong.check(are_possible, f"{path}.logprobs", f"has values outside the allowed range of {MIN_LOGPROB:g} to 0")
        ends = [0, *(span.end_token for span in rollout.version_spans)]
        covers = ends[-1] == num_response and all(
            span.start_token == end < span.end_token for span, end in zip(rollout.version_spans, ends, strict=False)
        )
        wrong.check(covers, f"{path}.version_spans", f"must cover response tokens [0, {num_response}) without gaps")

    def _check_advantage_or_reward(self, rollout: Rollout, path: str, wrong: Violations) -> None:
        """Check the advantage or advantages, or the reward that a critic computes them from."""
        advantage, advantages, reward = rollout.advantage, rollout.advantages, rollout.reward
        if self._config.critic is None:
            required = f"allowed: {-MAX_ADVANTAGE:g} to {MAX_ADVANTAGE:g}"
            if advantage is not None and advantages is not None:
                wrong.add(f"{path}.advantages", "is set, and so is advantage; set exactly one of the two")
            elif advantage is not None:
                wrong.check(abs(advantage) <= MAX_ADVANTAGE, f"{path}.advantage", f"is {advantage:g}; {required}")
            elif advantages is None:
                wrong.add(f"{path}.advantage", "is unset, and so is advantages; set exactly one of the two")
            else:
                not_allowed = advantages[~(np.abs(advantages) <= MAX_ADVANTAGE)]  # also NaN
                if not_allowed.size:
                    wrong.add(f"{path}.advantages", f"contains {not_allowed[0]:g}; {required}")
            wrong.check(
                reward is None,
                f"{path}.reward",
                "is set, but the learner has no critic. Leave it unset, or set `critic` in the learner's settings",
            )
            return
        needed = "the learner has a critic: send a finite reward and no advantages"
        is_usable = reward is not None and abs(reward) <= MAX_ADVANTAGE  # false of NaN
        wrong.check(
            is_usable,
            f"{path}.reward",
            f"is {'not set' if reward is None else reward}; {needed}; allowed: {-MAX_ADVANTAGE:g} to {MAX_ADVANTAGE:g}",
        )
        wrong.check(not advantage, f"{path}.advantage", f"is {advantage}; {needed}")
        wrong.check(advantages is None, f"{path}.advantages", f"is set; {needed}")


def _check_header(batch: Batch, num_rollouts: int) -> None:
    wrong = Violations()
    wrong.identifier("header.run_id", batch.run_id)
    wrong.identifier("header.batch_id", batch.batch_id)
    wrong.check(
        1 <= num_rollouts <= MAX_ROLLOUTS,
        "header.num_rollouts",
        f"is {num_rollouts}; allowed: 1 to {MAX_ROLLOUTS}",
    )
    wrong.check(
        MIN_TEMPERATURE <= batch.temperature <= MAX_TEMPERATURE,  # false of NaN
        "header.temperature",
        f"is {batch.temperature:g}; allowed: 0.01 to {MAX_TEMPERATURE:g} (greedy rollouts cannot be trained on)",
    )
    wrong.raise_if_any()
