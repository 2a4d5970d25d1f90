"""ValueService on the wire: protobuf to the estimator and the queue, and back.

Owns validation of requests and the answers' form. Knows no probe and no file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import grpc.aio

from poise.errors import Draining, NotFound
from poise.queue.interface import LabelQueue
from poise.runtime.startup import Startup
from poise.runtime.validation import Violations
from poise.value.config import ValueConfig
from poise.value.estimator import BaselineEstimator, GroupRows
from poise.value.labels import read_label, read_prompt, read_questions
from poise.value.settling import Settling
from poise_client.codec import DEFAULT_DOMAIN, encode_group_baselines, encode_probe_report, encode_prompt_score
from poise_client.types import ProbeReport, ProbeStatus
from poise_proto.v1 import value_pb2 as pb
from poise_proto.v1 import value_pb2_grpc

MAX_GROUPS = 4096
"""Most groups or prompts in a request."""

MAX_SETTLE_S = 600.0
"""Longest that a question may ask to wait."""

_SHARE_OF_DEADLINE = 0.9
"""Of the time that a call has left, what it may wait: the answer must still arrive."""

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

    def open(self, estimator: BaselineEstimator, queue: LabelQueue, settling: Settling) -> None:
        """Answer from now on."""
        self._estimator, self._queue, self._settling = estimator, queue, settling

    def close(self) -> None:
        """Refuse new requests with `Draining`."""
        self._closed = True

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
        wrong = Violations()
        wrong.identifier("run_id", request.run_id)
        wrong.check(
            0 <= request.settle_s <= MAX_SETTLE_S,  # false of NaN
            "settle_s",
            f"is {request.settle_s}; required: 0 to {MAX_SETTLE_S:g} seconds",
        )
        _check_count(request.groups, wrong)
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
        behind = await self._settle(request, domains, context)
        answers = estimator.estimate(request.run_id, request.step, groups, behind=behind)
        return pb.EstimateBaselinesResponse(groups=[encode_group_baselines(answer) for answer in answers])

    async def _settle(
        self, request: pb.EstimateBaselinesRequest, domains: Sequence[str], context: Context
    ) -> frozenset[str] | None:
        """Wait as the question asks, if it is the one that pins its step; return the domains that are behind even so,
        None where that is not known.

        Raises:
            Draining: the service shuts down meanwhile. Whoever takes over settles and answers.
        """
        estimator, _ = self._parts()
        if not request.settle_s or self._settling is None or not estimator.would_pin(request.run_id, request.step):
            return None
        left_s = context.time_remaining()
        limit_s = min(request.settle_s, math.inf if left_s is None else _SHARE_OF_DEADLINE * left_s)
        behind = await self._settling.settle(request.run_id, domains, limit_s)
        self._parts()
        return behind

    async def ScorePrompts(  # noqa: N802
        self, request: pb.ScorePromptsRequest, context: Context
    ) -> pb.ScorePromptsResponse:
        """See value.proto."""
        estimator, _ = self._parts()
        wrong = Violations()
        _check_count(request.prompts, wrong, "prompts")
        prompts = [read_prompt(prompt, f"prompts[{i}]", wrong) for i, prompt in enumerate(request.prompts[:MAX_GROUPS])]
        wrong.raise_if_any()
        scores = estimator.score([prompt for prompt in prompts if prompt is not None])
        return pb.ScorePromptsResponse(prompts=[encode_prompt_score(score) for score in scores])

    async def PublishLabels(  # noqa: N802
        self, request: pb.PublishLabelsRequest, context: Context
    ) -> pb.PublishLabelsResponse:
        """See value.proto."""
        estimator, queue = self._parts()
        wrong = Violations()
        _check_count(request.groups, wrong)
        limit = self._config.queue.max_entries
        wrong.check(
            len(request.groups) <= limit,
            "groups",
            f"has {len(request.groups)} groups, which never fit the queue of {limit}; publish them in parts",
        )
        widths = []
        for index, group in enumerate(request.groups):
            path = f"groups[{index}]"
            label = read_label(group, path, wrong)
            if label is None:
                continue
            refusal = estimator.refusal(label.domain, label.rows.width)
            if refusal is not None:
                wrong.add(f"{path}.{refusal.field}", refusal.description)
            widths.append((index, label.domain, label.rows.width))
        _check_widths(widths, wrong)
        payloads = [group.SerializeToString() for group in request.groups]
        max_bytes = self._config.queue.max_entry_bytes
        for index, payload in enumerate(payloads):
            size = len(payload)
            wrong.check(size <= max_bytes, f"groups[{index}]", f"is {size} bytes; at most {max_bytes} are accepted")
        limit, size = self._config.queue.max_bytes, sum(map(len, payloads))
        wrong.check(
            2 * size <= limit, "groups", f"are {size} bytes, too much for a queue of {limit}; publish them in parts"
        )
        wrong.raise_if_any()
        await queue.publish(payloads)
        return pb.PublishLabelsResponse(num_queued=len(payloads))

    async def GetProbe(self, request: pb.GetProbeRequest, context: Context) -> pb.GetProbeResponse:  # noqa: N802
        """See value.proto."""
        estimator, queue = self._parts()
        if request.domain and request.domain not in estimator.domains:
            known = ", ".join(sorted(estimator.domains)) or "none yet"
            raise NotFound(
                f"no label of domain {request.domain!r} has been learnt; known: {known}",
                remedy="Leave domain empty for all.",
            )
        depth = await queue.depth()
        names = [request.domain] if request.domain else sorted(estimator.domains)
        return encode_probe_report(
            ProbeReport(
                tuple(self._status(estimator, name) for name in names),
                estimator.num_groups_consumed,
                estimator.num_duplicates,
                depth.num_dead_letters,
                depth.num_entries,
            )
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


def _check_count(items: Sequence[object], wrong: Violations, name: str = "groups") -> None:
    wrong.check(1 <= len(items) <= MAX_GROUPS, name, f"has {len(items)} {name}; 1 to {MAX_GROUPS} are accepted")


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
