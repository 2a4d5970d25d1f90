"""The gRPC servicer: validates requests and translates between protobuf and the estimator or the queue."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import grpc.aio

from poise.errors import Draining, NotFound
from poise.runtime.rpc.validation import Violations, quoted
from poise.runtime.startup import Startup
from poise.value.config import ValueConfig
from poise.value.estimators.features import GroupQuery, Label
from poise.value.label_barrier import wait_for_labels
from poise.value.messages import EstimatorOf, read_label, read_prompt, read_queries
from poise.value.updater import Updater
from poise_client.codec import encode
from poise_client.types import DEFAULT_DOMAIN, ProbeReport, PromptFeatures
from poise_proto.v1 import value_pb2 as pb
from poise_proto.v1 import value_pb2_grpc

MAX_GROUPS = 4096
"""Maximum groups or prompts per request."""

MAX_ROLLOUTS = 65536
"""Maximum rollouts per request, over all groups."""

MAX_WAIT_S = 600.0
"""Maximum wait for labels."""

_SHARE_OF_DEADLINE = 0.9
"""Maximum share of a call's remaining time to wait for labels, so that the answer still arrives in time."""

T = TypeVar("T")

Context = grpc.aio.ServicerContext[object, object]


class ValueServicer(value_pb2_grpc.ValueServiceServicer):
    """Answers between `open` and `close`."""

    def __init__(self, config: ValueConfig, startup: Startup | None = None) -> None:
        self._config = config
        self._startup = startup or Startup("restoring the state")
        self._updater: Updater | None = None
        self._closed = False
        # Requests are parsed outside the event loop. One thread keeps them in order.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="value-reader")

    def open(self, updater: Updater) -> None:
        """Answer from now on."""
        self._updater = updater

    def close(self) -> None:
        """Reject new requests with `Draining`."""
        self._closed = True
        self._reader.shutdown(wait=False)  # requests that are already queued are still parsed

    async def _read_on_thread(self, read: Callable[[], T]) -> T:
        """Parse a request on the reader thread. Raises `Draining` if the service closes during that."""
        content = await asyncio.get_running_loop().run_in_executor(self._reader, read)
        self._opened()
        return content

    def _opened(self) -> Updater:
        if self._closed:
            raise Draining("the value service is shutting down", remedy="Retry: it restarts.")
        if self._updater is None:
            raise self._startup.error()
        return self._updater

    async def EstimateBaselines(  # noqa: N802
        self, request: pb.EstimateBaselinesRequest, context: Context
    ) -> pb.EstimateBaselinesResponse:
        """See value.proto."""
        updater = self._opened()
        estimator_of = updater.state.estimators_of_step(request.run_id, request.step)
        groups = await self._read_on_thread(lambda: _read_queries(request, estimator_of))
        behind = None
        if request.wait_for_labels_s and updater.state.would_pin(request.run_id, request.step):
            left_s = context.time_remaining()
            limit_s = min(request.wait_for_labels_s, math.inf if left_s is None else _SHARE_OF_DEADLINE * left_s)
            behind = await wait_for_labels(updater, request.run_id, [group.domain for group in groups], limit_s)
            self._opened()
        answers = updater.state.estimate(request.run_id, request.step, groups, behind=behind)
        return pb.EstimateBaselinesResponse(groups=[encode(answer, pb.GroupBaselines) for answer in answers])

    async def ScorePrompts(  # noqa: N802
        self, request: pb.ScorePromptsRequest, context: Context
    ) -> pb.ScorePromptsResponse:
        """See value.proto."""
        state = self._opened().state
        scores = state.score(await self._read_on_thread(lambda: _read_prompts(request)))
        return pb.ScorePromptsResponse(prompts=[encode(score, pb.PromptScore) for score in scores])

    async def PublishLabels(  # noqa: N802
        self, request: pb.PublishLabelsRequest, context: Context
    ) -> pb.PublishLabelsResponse:
        """See value.proto."""
        updater = self._opened()
        wrong = Violations()
        labels, payloads = await self._read_on_thread(lambda: _read_labels(request, self._config, wrong))
        for index, label in labels:
            rejection = updater.state.rejection(label.domain, label.features.width)
            if rejection is not None:
                wrong.add(f"groups[{index}].{rejection.field}", rejection.description)
        _check_widths([(index, label.domain, label.features.width) for index, label in labels], wrong)
        wrong.raise_if_any()
        await updater.queue.publish(payloads)
        return pb.PublishLabelsResponse(num_queued=len(payloads))

    async def GetProbe(self, request: pb.GetProbeRequest, context: Context) -> pb.GetProbeResponse:  # noqa: N802
        """See value.proto."""
        updater = self._opened()
        state = updater.state
        if request.domain and request.domain not in state.domains:
            known = ", ".join(sorted(state.domains)) or "none yet"
            raise NotFound(
                f"no label of domain {quoted(request.domain)} was learnt; domains with labels: {known}",
                remedy="Leave domain empty to get all.",
            )
        depth = await updater.queue.depth()
        names = [request.domain] if request.domain else sorted(state.domains)
        return encode(
            ProbeReport(
                tuple(state.probe_status(name) for name in names),
                state.num_groups_consumed,
                state.num_duplicates,
                depth.num_dead_letters,
                depth.num_entries,
                self._config.estimator,
                self._config.estimator_by_domain,
            ),
            pb.GetProbeResponse,
        )


def _read_queries(request: pb.EstimateBaselinesRequest, estimator_of: EstimatorOf) -> list[GroupQuery]:
    wrong = Violations()
    wrong.identifier("run_id", request.run_id)
    wrong.check(
        0 <= request.wait_for_labels_s <= MAX_WAIT_S,  # False for NaN
        "wait_for_labels_s",
        f"is {request.wait_for_labels_s}; required: 0 to {MAX_WAIT_S:g} seconds",
    )
    _check_counts(request.groups, wrong)
    domains = [group.domain or DEFAULT_DOMAIN for group in request.groups]
    for index, (group, domain) in enumerate(zip(request.groups, domains, strict=True)):
        wrong.identifier(f"groups[{index}].group_id", group.group_id)
        wrong.identifier(f"groups[{index}].domain", domain)
    queries = read_queries(request.groups, wrong, estimator_of)
    groups = [query for query in queries if query is not None]
    _check_widths([(i, query.domain, query.features.width) for i, query in enumerate(queries) if query], wrong)
    wrong.raise_if_any()
    return groups


def _read_prompts(request: pb.ScorePromptsRequest) -> list[PromptFeatures]:
    wrong = Violations()
    wrong.check_count("prompts", len(request.prompts), MAX_GROUPS, at_least=1)
    prompts = [read_prompt(prompt, f"prompts[{i}]", wrong) for i, prompt in enumerate(request.prompts)]
    wrong.raise_if_any()
    return [prompt for prompt in prompts if prompt is not None]


def _read_labels(
    request: pb.PublishLabelsRequest, config: ValueConfig, wrong: Violations
) -> tuple[list[tuple[int, Label]], list[bytes]]:
    """Return the valid labels, each with its index, and the queue entry of every group."""
    limits = config.queue
    _check_counts(request.groups, wrong)
    wrong.check(
        len(request.groups) <= limits.max_entries,
        "groups",
        f"has {len(request.groups)} groups, more than queue.max_entries = {limits.max_entries}; publish them in parts",
    )
    labels: list[tuple[int, Label]] = []
    for index, group in enumerate(request.groups):
        if wrong.is_full:
            break
        label = read_label(group, f"groups[{index}]", wrong, config.estimator_of)
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
        f"are {size} bytes, more than half of queue.max_bytes = {limits.max_bytes}; publish them in parts",
    )
    return labels, payloads


def _check_counts(groups: Sequence[pb.GroupFeatures] | Sequence[pb.LabelledGroup], wrong: Violations) -> None:
    wrong.check_count("groups", len(groups), MAX_GROUPS, at_least=1)
    wrong.check_count("groups.rollouts", sum(len(group.rollouts) for group in groups), MAX_ROLLOUTS)


def _check_widths(widths: Sequence[tuple[int, str, int]], wrong: Violations) -> None:
    """Check that groups of one domain within a request agree on the width. Takes (index, domain, width or 0)."""
    first: dict[str, tuple[int, int]] = {}
    for index, domain, width in widths:
        if not width:
            continue
        first_index, expected = first.setdefault(domain, (index, width))
        wrong.check(
            width == expected,
            f"groups[{index}].rollouts",
            f"hidden states have width {width}; those of groups[{first_index}] of the same domain have {expected}",
        )
