"""The client of the value service."""

from __future__ import annotations

from collections.abc import Sequence

from poise_client._client import AsyncClient, encoding, pack
from poise_client._retry import Attempts
from poise_client._status import renumber
from poise_client.codec import (
    CodecError,
    decode_group_baselines,
    decode_probe_report,
    decode_prompt_score,
    encode_group_features,
    encode_labelled_group,
    encode_prompt_features,
)
from poise_client.errors import PoiseClientError
from poise_client.types import GroupBaselines, GroupFeatures, LabelledGroup, ProbeReport, PromptFeatures, PromptScore
from poise_proto.v1 import value_pb2 as pb
from poise_proto.v1.value_pb2_grpc import ValueServiceStub

TIMEOUT_S = 60.0
"""Of each call, all its requests and retries included."""


class AsyncValueClient(AsyncClient):
    """Asks the value service what reward was to be expected, and tells it what came."""

    service = "ValueService"

    async def estimate_baselines(
        self,
        run_id: str,
        step: int,
        groups: Sequence[GroupFeatures],
        *,
        wait_for_labels_s: float = 0.0,
        timeout_s: float | None = None,
    ) -> list[GroupBaselines]:
        """Value a step's rollouts; the answers come in the order of `groups`.

        Must come before `publish_labels` of the same step. The first answer pins the step's probe: asking again gives
        the same numbers. Many groups are split over requests.

        Args:
            run_id: the training run.
            step: step of the run.
            groups: the features of each prompt's siblings.
            wait_for_labels_s: longest wait, before the first answer for a step, until the probes are fitted on every
                label published before. It covers the domains asked about and those that the run has taught.
                `GroupBaselines.up_to_date` says whether the wait succeeded. 0 uses the current probes.
                Every request carries it, but only the one that pins the step waits: the first.
            timeout_s: deadline of it all; a minute by default.

        Raises:
            LabelsConsumedError: the probe has learnt from this step, which was not valued before.
            PoiseClientError: see `poise_client.errors`.
        """
        messages = []
        for i, group in enumerate(groups):
            with encoding(f"groups[{i}]"):
                messages.append(encode_group_features(group, f"groups[{i}]"))
        attempts = self._attempts(timeout_s, TIMEOUT_S)
        answers: list[GroupBaselines] = []
        for part in pack(messages):
            with encoding("request"):
                request = pb.EstimateBaselinesRequest(
                    run_id=run_id, step=step, groups=[messages[i] for i in part], wait_for_labels_s=wait_for_labels_s
                )
            try:
                answers += await self._estimate(request, attempts)
            except PoiseClientError as error:
                renumber(error, "groups", part)
                raise
        return answers

    async def _estimate(self, request: pb.EstimateBaselinesRequest, attempts: Attempts) -> list[GroupBaselines]:
        def decode(response: pb.EstimateBaselinesResponse) -> list[GroupBaselines]:
            if [group.group_id for group in response.groups] != [group.group_id for group in request.groups]:
                raise CodecError("groups", "are not the groups asked for")
            answers = [decode_group_baselines(group, f"groups[{i}]") for i, group in enumerate(response.groups)]
            for i, (asked, answer) in enumerate(zip(request.groups, answers, strict=True)):
                if answer.values is not None and answer.values.size != len(asked.rollouts):
                    raise CodecError(
                        f"groups[{i}].values", f"has {answer.values.size} for {len(asked.rollouts)} rollouts"
                    )
            return answers

        return await self._call(
            "EstimateBaselines",
            attempts,
            lambda left_s: ValueServiceStub(self._open()).EstimateBaselines(
                request, timeout=left_s, metadata=self._dialer.metadata
            ),
            decode,
        )

    async def score_prompts(
        self, prompts: Sequence[PromptFeatures], *, timeout_s: float | None = None
    ) -> list[PromptScore]:
        """Value prompts before any rollout, by the current probes; the answers come in the order of `prompts`.

        For choosing what to sample. It pins nothing and may be asked at any time: a step's baselines are
        `estimate_baselines`' alone. Many prompts are split over requests.

        Args:
            prompts: their states, from `AsyncGenerationClient.encode_prompts`.
            timeout_s: deadline of it all; a minute by default.

        Raises:
            InvalidRequestError: the service's probes have no `prompt_hidden` among their inputs; or another width.
            PoiseClientError: see `poise_client.errors`.
        """
        messages = []
        for i, prompt in enumerate(prompts):
            with encoding(f"prompts[{i}]"):
                messages.append(encode_prompt_features(prompt, f"prompts[{i}]"))
        attempts = self._attempts(timeout_s, TIMEOUT_S)
        scores: list[PromptScore] = []
        for part in pack(messages):
            request = pb.ScorePromptsRequest(prompts=[messages[i] for i in part])
            try:
                scores += await self._score(request, attempts)
            except PoiseClientError as error:
                renumber(error, "prompts", part)
                raise
        return scores

    async def _score(self, request: pb.ScorePromptsRequest, attempts: Attempts) -> list[PromptScore]:
        def decode(response: pb.ScorePromptsResponse) -> list[PromptScore]:
            if [prompt.group_id for prompt in response.prompts] != [prompt.group_id for prompt in request.prompts]:
                raise CodecError("prompts", "are not the prompts asked for")
            return [decode_prompt_score(prompt, f"prompts[{i}]") for i, prompt in enumerate(response.prompts)]

        return await self._call(
            "ScorePrompts",
            attempts,
            lambda left_s: ValueServiceStub(self._open()).ScorePrompts(
                request, timeout=left_s, metadata=self._dialer.metadata
            ),
            decode,
        )

    async def publish_labels(self, groups: Sequence[LabelledGroup], *, timeout_s: float | None = None) -> int:
        """Queue labelled groups, durably, for the probe to learn from; return how many.

        Publishing a group again does no harm: the probe learns from each once. Many groups are split over requests.

        Args:
            groups: features and rewards of each prompt's siblings.
            timeout_s: deadline of it all; a minute by default.

        Raises:
            QueueFullError: the probe did not keep up until the deadline.
            PoiseClientError: see `poise_client.errors`.
        """
        messages = []
        for i, group in enumerate(groups):
            with encoding(f"groups[{i}]"):
                messages.append(encode_labelled_group(group, f"groups[{i}]"))
        attempts = self._attempts(timeout_s, TIMEOUT_S)
        num_queued = 0
        for part in pack(messages):
            request = pb.PublishLabelsRequest(groups=[messages[i] for i in part])
            try:
                num_queued += await self._publish(request, attempts)
            except PoiseClientError as error:
                renumber(error, "groups", part)
                raise
        return num_queued

    async def _publish(self, request: pb.PublishLabelsRequest, attempts: Attempts) -> int:
        return await self._call(
            "PublishLabels",
            attempts,
            lambda left_s: ValueServiceStub(self._open()).PublishLabels(
                request, timeout=left_s, metadata=self._dialer.metadata
            ),
            lambda response: response.num_queued,
        )

    async def get_probe(self, domain: str = "", *, timeout_s: float | None = None) -> ProbeReport:
        """Ask for the state and quality of one domain's probe, or of all."""
        with encoding("domain"):
            request = pb.GetProbeRequest(domain=domain)
        return await self._call(
            "GetProbe",
            self._attempts(timeout_s, TIMEOUT_S),
            lambda left_s: ValueServiceStub(self._open()).GetProbe(
                request, timeout=left_s, metadata=self._dialer.metadata
            ),
            decode_probe_report,
        )
