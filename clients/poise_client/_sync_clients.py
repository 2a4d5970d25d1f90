"""The blocking twins of the three async clients: the same calls, for scripts, notebooks and threads.

Nothing is decided here: each call is handed to the async client, and waited for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from poise_client._generation import AsyncGenerationClient
from poise_client._learner import AsyncLearnerClient
from poise_client._sync import GroupStream, SyncClient
from poise_client._value import AsyncValueClient
from poise_client._weights import WeightPush
from poise_client.types import (
    Batch,
    EncodedPrompt,
    GroupBaselines,
    GroupFeatures,
    LabelledGroup,
    LearnerStatus,
    ModelExport,
    Policy,
    ProbeReport,
    Prompt,
    PromptCheck,
    PromptFeatures,
    PromptScore,
    Sampling,
    StepResult,
    WeightArray,
    WeightUpdate,
)


class GenerationClient(SyncClient[AsyncGenerationClient]):
    """Samples rollouts from one generation replica, and gives it new weights. Blocks; see `AsyncGenerationClient`."""

    service = AsyncGenerationClient.service
    _twin = AsyncGenerationClient

    def stream_trajectories(
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
    ) -> GroupStream:
        """Sample `num_rollouts` responses to each prompt; yield each group once, in order of finishing.

        Nothing is sent before the first `next`. When the service fails midway, the groups not yet yielded are asked for
        again. Closing the iterator, or leaving a `for` early, cancels what still runs in the service.

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
        groups = self._client.stream_trajectories(
            run_id,
            step,
            prompts,
            num_rollouts=num_rollouts,
            sampling=sampling,
            return_token_entropies=return_token_entropies,
            min_policy_version=min_policy_version,
            timeout_s=timeout_s,
        )
        return GroupStream(self, groups)

    def encode_prompts(self, prompts: Sequence[Prompt], *, timeout_s: float | None = None) -> list[EncodedPrompt]:
        """Return each prompt's state, by one pass through the model without sampling, in the order of `prompts`.

        What `ValueClient.score_prompts` values prompts by, before any rollout.

        Args:
            prompts: what to encode; their group ids must differ.
            timeout_s: deadline of it all; 5 minutes by default.

        Raises:
            PoiseClientError: see `poise_client.errors`.
        """
        return self._run(self._client.encode_prompts(prompts, timeout_s=timeout_s))

    def check_prompts(self, prompts: Sequence[Prompt], *, timeout_s: float | None = None) -> list[PromptCheck]:
        """Return how many tokens each prompt has, or why it cannot be sampled, in the order of `prompts`.

        Nothing passes through the model. Compare the tokens, and those of a response, with `Policy.max_model_len`.

        Args:
            prompts: what to check; their group ids must differ.
            timeout_s: deadline of it all; 5 minutes by default.

        Raises:
            PoiseClientError: see `poise_client.errors`.
        """
        return self._run(self._client.check_prompts(prompts, timeout_s=timeout_s))

    def get_policy(self, *, timeout_s: float | None = None) -> Policy:
        """Ask which policy is served, and what the engine can do."""
        return self._run(self._client.get_policy(timeout_s=timeout_s))

    def update_weights(
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
        return self._run(
            self._client.update_weights(
                lineage_id=lineage_id, policy_version=policy_version, weights=weights, timeout_s=timeout_s
            )
        )

    def push_weights(self, push: WeightPush, *, timeout_s: float | None = None) -> WeightUpdate:
        """Serve a version that was made ready before: for several replicas, deltas, or a body in a shared file.

        Args:
            push: which parameters, and how they travel.
            timeout_s: deadline; 5 minutes by default.

        Raises:
            VersionMismatchError: it is a delta, and its base is not what the replica serves and keeps.
            ConflictError: the version is taken by other weights, or lower than the one served.
            PoiseClientError: see `poise_client.errors`.
        """
        return self._run(self._client.push_weights(push, timeout_s=timeout_s))


class ValueClient(SyncClient[AsyncValueClient]):
    """Asks the value service what reward was to be expected, and tells it what came. Blocks; see `AsyncValueClient`."""

    service = AsyncValueClient.service
    _twin = AsyncValueClient

    def estimate_baselines(
        self,
        run_id: str,
        step: int,
        groups: Sequence[GroupFeatures],
        *,
        wait_for_labels_s: float = 0.0,
        timeout_s: float | None = None,
    ) -> list[GroupBaselines]:
        """Value a step's rollouts, before its labels are published; the answers come in the order of `groups`.

        Args:
            run_id: the training run.
            step: step of the run.
            groups: the features of each prompt's siblings.
            wait_for_labels_s: longest wait, before the first answer for a step, until the probes are fitted on every
                label published before. It covers the domains asked about and those that the run has taught.
                `GroupBaselines.up_to_date` says whether the wait succeeded. 0 uses the current probes.
            timeout_s: deadline of it all; a minute by default.

        Raises:
            LabelsConsumedError: the probe has learnt from this step, which was not valued before.
            PoiseClientError: see `poise_client.errors`.
        """
        return self._run(
            self._client.estimate_baselines(
                run_id, step, groups, wait_for_labels_s=wait_for_labels_s, timeout_s=timeout_s
            )
        )

    def score_prompts(self, prompts: Sequence[PromptFeatures], *, timeout_s: float | None = None) -> list[PromptScore]:
        """Value prompts before any rollout, by the current probes; the answers come in the order of `prompts`.

        For choosing what to sample. It pins nothing and may be asked at any time: a step's baselines are
        `estimate_baselines`' alone.

        Args:
            prompts: their states, from `GenerationClient.encode_prompts`.
            timeout_s: deadline of it all; a minute by default.

        Raises:
            InvalidRequestError: the service's probes have no `prompt_hidden` among their inputs; or another width.
            PoiseClientError: see `poise_client.errors`.
        """
        return self._run(self._client.score_prompts(prompts, timeout_s=timeout_s))

    def publish_labels(self, groups: Sequence[LabelledGroup], *, timeout_s: float | None = None) -> int:
        """Queue labelled groups, durably, for the probe to learn from; return how many.

        Publishing a group again does no harm: the probe learns from each once.

        Args:
            groups: features and rewards of each prompt's siblings.
            timeout_s: deadline of it all; a minute by default.

        Raises:
            QueueFullError: the probe did not keep up until the deadline.
            PoiseClientError: see `poise_client.errors`.
        """
        return self._run(self._client.publish_labels(groups, timeout_s=timeout_s))

    def get_probe(self, domain: str = "", *, timeout_s: float | None = None) -> ProbeReport:
        """Ask for the state and quality of one domain's probe, or of all."""
        return self._run(self._client.get_probe(domain, timeout_s=timeout_s))


class LearnerClient(SyncClient[AsyncLearnerClient]):
    """Gives the learner advantages to train on. Blocks; see `AsyncLearnerClient`."""

    service = AsyncLearnerClient.service
    _twin = AsyncLearnerClient

    def submit_advantages(self, batch: Batch, *, timeout_s: float | None = None) -> StepResult:
        """Train on a batch; return after its weights were offered to every replica.

        A batch id that was trained on gets its stored answer, with `duplicate` set: submitting again is safe.

        Args:
            batch: the rollouts with their advantages, or with their rewards where the learner has a critic.
            timeout_s: deadline; 30 minutes by default.

        Raises:
            ConflictError: the batch id was trained on with other content.
            TrainingStoppedError: the last updates in a row were not finite, and nothing is trained on.
            PoiseClientError: see `poise_client.errors`.
        """
        return self._run(self._client.submit_advantages(batch, timeout_s=timeout_s))

    def get_status(self, *, timeout_s: float | None = None) -> LearnerStatus:
        """Ask what the learner holds and does."""
        return self._run(self._client.get_status(timeout_s=timeout_s))

    def export_model(self, name: str, *, check_only: bool = False, timeout_s: float | None = None) -> ModelExport:
        """Write the current policy as a Hugging Face folder `name` on the learner's file system.

        An export of the same name is replaced. `check_only` raises what an export would raise, and leaves nothing.
        `timeout_s` is 5 minutes by default.
        """
        return self._run(self._client.export_model(name, check_only=check_only, timeout_s=timeout_s))
