"""ValueService on the wire: protobuf to the estimator and the queue, and back.

Owns validation of requests and the answers' form. Knows no probe and no file.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import grpc.aio

from poise.errors import Draining, NotFound
from poise.queue.interface import LabelQueue
from poise.runtime.rpc.validation import Violations, quoted
from poise.runtime.startup import Startup
from poise.value.config import QueueConfig, ValueConfig
from poise.value.estimator import BaselineEstimator, GroupRows
from poise.value.label_barrier import Settling
from poise.value.messages import read_label, read_prompt, read_questions
from poise.value.probe.features import LabelledRows
from poise_client.codec import encode
from poise_client.types import DEFAULT_DOMAIN, ProbeReport, ProbeStatus, PromptFeatures
from poise_proto.v1 import value_pb2 as pb
from poise_proto.v1 import value_pb2_grpc

MAX_GROUPS = 4096
"""Most groups or prompts in a request."""

MAX_ROLLOUTS = 65536
"""Most rollouts of all groups of a request."""

MAX_SETTLE_S = 600.0
"""Longest that a question may ask to wait."""

_SHARE_OF_DEADLINE = 0.9
"""Of the time that a call has left, what it may wait: the answer must still arrive."""

T = TypeVar("T")

Context = grpc.aio.ServicerContext[object, object]


class ValueServicer(value_pb2_grpc.ValueServiceServicer):
    """Answers nothing until `open`, and nothing new after `close`."""

    def __init__(self, config: ValueConfig, startup: Startup | None = None) -> None:
        self._config = config
        self._startup = startup or Startup("restoring the state")
        self._estimator: BaselineEstimator | None = None
        self._queue: LabelQueue | None = None
        self._settling: Settling | None = None
        self._closed = False
        # One thread keeps requests in order, and reading them off the event loop.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="value-reader")

    def open(self, estimator: BaselineEstimator, queue: LabelQueue, settling: Settling) -> None:
        """Answer from now on."""
        self._estimator, self._queue, self._settling = estimator, queue, settling

    def close(self) -> None:
        """Refuse new requests with `Draining`."""
        self._closed = True
        self._reader.shutdown(wait=False)  # requests already queued are still read

    async def _read_on_thread(self, read: Callable[[], T]) -> T:
        """Read a request on the reader thread. Raises `Draining` if the service closed meanwhile."""
        content = await asyncio.get_running_loop().run_in_executor(self._reader, read)
        self._parts()
        return content

    def _parts(self) -> tuple[BaselineEstimator, LabelQueue]:
        if self._closed:
            raise Draining("the value service is shutting down", remedy="Try again; another will take over.")
        if self._estimator is None or self._queue is None:
            raise self._startup.error()
        return self._estimator, self._queue

    async def EstimateBaselines(  # noqa: N802
        self, request: pb.EstimateBaselinesRequest, context: Context
    ) -> pb.EstimateBaselinesResponse:
        """See value.proto."""
        estimator, _ = self._parts()
        groups = await self._read_on_thread(lambda: _read_questions(request))
        domains = [group.domain for group in groups]
        behind = await self._settle(request, domains, context)
        answers = estimator.estimate(request.run_id, request.step, groups, behind=behind)
        return pb.EstimateBaselinesResponse(groups=[encode(answer, pb.GroupBaselines) for answer in answers])

    async def _settle(
        self, request: pb.EstimateBaselinesRequest, domains: Sequence[str], context: Context
    ) -> frozenset[str] | None:
        """Wait as the question asks, if it is the one that pins its step; return the domains that are behind even so,
        None where that is not known.

        Raises:
            Draining: the service shuts down meanwhile. Whoever takes over settles and answers.
        """
        estimator, _ = self._parts()
        if (
            not request.wait_for_labels_s
            or self._settling is None
            or not estimator.would_pin(request.run_id, request.step)
        ):
            return None
        left_s = context.time_remaining()
        limit_s = min(request.wait_for_labels_s, math.inf if left_s is None else _SHARE_OF_DEADLINE * left_s)
        behind = await self._settling.settle(request.run_id, domains, limit_s)
        self._parts()
        return behind

    async def ScorePrompts(  # noqa: N802
        self, request: pb.ScorePromptsRequest, context: Context
    ) -> pb.ScorePromptsResponse:
        """See value.proto."""
        estimator, _ = self._parts()
        scores = estimator.score(await self._read_on_thread(lambda: _read_prompts(request)))
        return pb.ScorePromptsResponse(prompts=[encode(score, pb.PromptScore) for score in scores])

    async def PublishLabels(  # noqa: N802
        self, request: pb.PublishLabelsRequest, context: Context
    ) -> pb.PublishLabelsResponse:
        """See value.proto."""
        estimator, queue = self._parts()
        wrong = Violations()
        labels, payloads = await self._read_on_thread(lambda: _read_labels(request, self._config.queue, wrong))
        for index, label in labels:
            refusal = estimator.refusal(label.domain, label.rows.width)
            if refusal is not None:
                wrong.add(f"groups[{index}].{refusal.field}", refusal.description)
        _check_widths([(index, label.domain, label.rows.width) for index, label in labels], wrong)
        wrong.raise_if_any()
        await queue.publish(payloads)
        return pb.PublishLabelsResponse(num_queued=len(payloads))

    async def GetProbe(self, request: pb.GetProbeRequest, context: Context) -> pb.GetProbeResponse:  # noqa: N802
        """See value.proto."""
        estimator, queue = self._parts()
        if request.domain and request.domain not in estimator.domains:
            known = ", ".join(sorted(estimator.domains)) or "none yet"
            raise NotFound(
                f"no label of domain {quoted(request.domain)} has been learnt; known: {known}",
                remedy="Leave domain empty for all.",
            )
        depth = await queue.depth()
        names = [request.domain] if request.domain else sorted(estimator.domains)
        return encode(
            ProbeReport(
                tuple(self._status(estimator, name) for name in names),
                estimator.num_groups_consumed,
                estimator.num_duplicates,
                depth.num_dead_letters,
                depth.num_entries,
            ),
            pb.GetProbeResponse,
        )

    def _status(self, estimator: BaselineEstimator, name: str) -> ProbeStatus:
        return probe_status(estimator, name, self._config.probe.warmup_steps)


def probe_status(estimator: BaselineEstimator, name: str, warmup_steps: int) -> ProbeStatus:
    """Return what is known of one domain's probe."""
    domain, probe = estimator.domains[name], estimator.probes.get(name)
    return ProbeStatus(
        domain=name,
        probe_version=probe.version if probe else 0,
        num_groups=len(domain.window.groups),
        num_rows=domain.window.num_rows,
        num_steps_seen=domain.num_steps_seen,
        warmup_steps=warmup_steps,
        last_fit_s=probe.fit_s if probe else 0.0,
        label_lag_s=domain.label_lag_s,
        quality=domain.record.quality(),
    )


def _read_questions(request: pb.EstimateBaselinesRequest) -> list[GroupRows]:
    wrong = Violations()
    wrong.identifier("run_id", request.run_id)
    wrong.check(
        0 <= request.wait_for_labels_s <= MAX_SETTLE_S,  # false of NaN
        "wait_for_labels_s",
        f"is {request.wait_for_labels_s}; required: 0 to {MAX_SETTLE_S:g} seconds",
    )
    _check_counts(request.groups, wrong)
    domains = [group.domain or DEFAULT_DOMAIN for group in request.groups]
    for index, (group, domain) in enumerate(zip(request.groups, domains, strict=True)):
        wrong.identifier(f"groups[{index}].group_id", group.group_id)
        wrong.identifier(f"groups[{index}].domain", domain)
    groups: list[GroupRows] = []
    widths: list[tuple[int, str, int]] = []
    for index, rows in enumerate(read_questions(request.groups, wrong)):
        if rows is not None:
            groups.append(GroupRows(request.groups[index].group_id, domains[index], rows))
            widths.append((index, domains[index], rows.width))
    _check_widths(widths, wrong)
    wrong.raise_if_any()
    return groups


def _read_prompts(request: pb.ScorePromptsRequest) -> list[PromptFeatures]:
    wrong = Violations()
    wrong.count("prompts", len(request.prompts), MAX_GROUPS, at_least=1)
    prompts = [read_prompt(prompt, f"prompts[{i}]", wrong) for i, prompt in enumerate(request.prompts)]
    wrong.raise_if_any()
    return [prompt for prompt in prompts if prompt is not None]


def _read_labels(
    request: pb.PublishLabelsRequest, limits: QueueConfig, wrong: Violations
) -> tuple[list[tuple[int, LabelledRows]], list[bytes]]:
    """Return the readable labels, each with its index, and the queue entry of every group."""
    _check_counts(request.groups, wrong)
    wrong.check(
        len(request.groups) <= limits.max_entries,
        "groups",
        f"has {len(request.groups)} groups, which never fit the queue of {limits.max_entries}; publish them in parts",
    )
    labels: list[tuple[int, LabelledRows]] = []
    for index, group in enumerate(request.groups):
        if wrong.is_full:
            break
        label = read_label(group, f"groups[{index}]", wrong)
        if label is not None:
            labels.append((index, label))
    payloads = [group.SerializeToString() for group in request.groups]
    for index, size in enumerate(map(len, payloads)):
        wrong.check(
            size <= limits.max_entry_bytes,
            f"groups[{index}]",
            f"is {size} bytes; at most {limits.max_entry_bytes} are accepted",
        )
    size = sum(map(len, payloads))
    wrong.check(
        2 * size <= limits.max_bytes,
        "groups",
        f"are {size} bytes, too much for a queue of {limits.max_bytes}; publish them in parts",
    )
    return labels, payloads


def _check_counts(groups: Sequence[pb.GroupFeatures] | Sequence[pb.LabelledGroup], wrong: Violations) -> None:
    wrong.count("groups", len(groups), MAX_GROUPS, at_least=1)
    wrong.count("groups.rollouts", sum(len(group.rollouts) for group in groups), MAX_ROLLOUTS)


def _check_widths(widths: Sequence[tuple[int, str, int]], wrong: Violations) -> None:
    """Groups of one domain within a request must agree, whatever is known of the domain: (index, domain, width)."""
    first: dict[str, tuple[int, int]] = {}
    for index, domain, width in widths:
        first_index, expected = first.setdefault(domain, (index, width))
        wrong.check(
            width == expected,
            f"groups[{index}].rollouts",
            f"hidden states are {width} wide, those of groups[{first_index}] of the same domain {expected}",
        )
