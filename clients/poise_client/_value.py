"""The async client of the value service."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from poise_client._transport.client import AsyncClient, encode_each, encoding
from poise_client.codec import CodecError, decode
from poise_client.types import Group, GroupBaselines, ProbeReport, PromptFeatures, PromptScore
from poise_proto.v1 import value_pb2 as pb
from poise_proto.v1.value_pb2_grpc import ValueServiceStub

TIMEOUT_S = 60.0
"""Default deadline of a call, with all its requests and retries."""


class AsyncValueClient(AsyncClient):
    """Requests baselines of rollouts, and publishes rewards for the probe to learn from."""

    service = "ValueService"
    _stub = ValueServiceStub

    async def estimate_baselines(
        self,
        run_id: str,
        step: int,
        groups: Sequence[Group],
        *,
        wait_for_labels_s: float = 0.0,
        timeout_s: float | None = None,
    ) -> list[GroupBaselines]:
        """Return the baselines of a step's rollouts, in the order of `groups`.

        Call it before `publish_labels` of the same step. The first call for a step pins the probe versions of that
        step, so a repeated call returns the same numbers.

        Args:
            run_id: the training run.
            step: step of the run.
            groups: groups whose rollouts have features, and rewards if the probe uses the siblings' rewards.
            wait_for_labels_s: maximum wait, in the first call for a step, until the probes are fitted on every label
                published before. It covers the domains of `groups`, and domains with labels from this run.
                `GroupBaselines.up_to_date` is True if the wait succeeded. 0 uses the current probes.
            timeout_s: deadline; a minute by default.

        Raises:
            LabelsConsumedError: a label of the step reached the probe before the first call for the step.
            PoiseClientError: see `poise_client.errors`.
        """
        answers = await self._call_in_parts(
            "EstimateBaselines",
            self._attempts(timeout_s, TIMEOUT_S),
            "groups",
            encode_each(groups, pb.GroupFeatures, "groups"),
            lambda part: pb.EstimateBaselinesRequest(
                run_id=run_id, step=step, groups=part, wait_for_labels_s=wait_for_labels_s
            ),
            _read_baselines,
        )
        return [baselines for part in answers for baselines in part]

    async def score_prompts(
        self, prompts: Sequence[PromptFeatures], *, timeout_s: float | None = None
    ) -> list[PromptScore]:
        """Return the predicted mean reward of prompts before any rollout, in the order of `prompts`.

        Use it to choose prompts to sample. It uses the current probes and does not pin their versions for a step, so it
        may be called at any time. Baselines come only from `estimate_baselines`.

        Args:
            prompts: hidden states of the prompts, from `encode_prompts` of the generation client.
            timeout_s: deadline; a minute by default.

        Raises:
            InvalidRequestError: the probes do not use `prompt_hidden`, or the width differs from theirs.
            PoiseClientError: see `poise_client.errors`.
        """
        answers = await self._call_in_parts(
            "ScorePrompts",
            self._attempts(timeout_s, TIMEOUT_S),
            "prompts",
            encode_each(prompts, pb.PromptFeatures, "prompts"),
            lambda part: pb.ScorePromptsRequest(prompts=part),
            _read_scores,
        )
        return [score for part in answers for score in part]

    async def publish_labels(self, groups: Sequence[Group], *, timeout_s: float | None = None) -> int:
        """Queue labels for the probe, and return the number of groups that are durable in the queue.

        Call it after `estimate_baselines` of the same step. Repeating it is safe: the probe learns each rollout once.

        Args:
            groups: whole groups whose rollouts have features and rewards.
            timeout_s: deadline; a minute by default.

        Raises:
            QueueFullError: the queue stayed full until the deadline.
            PoiseClientError: see `poise_client.errors`.
        """
        counts = await self._call_in_parts(
            "PublishLabels",
            self._attempts(timeout_s, TIMEOUT_S),
            "groups",
            encode_each(groups, pb.LabelledGroup, "groups"),
            lambda part: pb.PublishLabelsRequest(groups=part),
            lambda request, response: int(response.num_queued),
        )
        return sum(counts)

    async def get_probe(self, domain: str = "", *, timeout_s: float | None = None) -> ProbeReport:
        """Return state and quality of one domain's probe, or of all probes. `timeout_s` is a minute by default."""
        with encoding("domain"):
            request = pb.GetProbeRequest(domain=domain)
        attempts = self._attempts(timeout_s, TIMEOUT_S)
        return await self._call("GetProbe", attempts, request, partial(decode, kind=ProbeReport))


def _read_baselines(
    request: pb.EstimateBaselinesRequest, response: pb.EstimateBaselinesResponse
) -> list[GroupBaselines]:
    if [group.group_id for group in response.groups] != [group.group_id for group in request.groups]:
        raise CodecError("groups", "are not the groups of the request")
    answers = [decode(group, GroupBaselines, f"groups[{i}]") for i, group in enumerate(response.groups)]
    for i, (requested, answer) in enumerate(zip(request.groups, answers, strict=True)):
        if answer.values is not None and answer.values.size != len(requested.rollouts):
            raise CodecError(f"groups[{i}].values", f"has {answer.values.size} for {len(requested.rollouts)} rollouts")
    return answers


def _read_scores(request: pb.ScorePromptsRequest, response: pb.ScorePromptsResponse) -> list[PromptScore]:
    if [prompt.group_id for prompt in response.prompts] != [prompt.group_id for prompt in request.prompts]:
        raise CodecError("prompts", "are not the prompts of the request")
    return [decode(prompt, PromptScore, f"prompts[{i}]") for i, prompt in enumerate(response.prompts)]
