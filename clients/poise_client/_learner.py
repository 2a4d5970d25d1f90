"""The async client of the learner service."""

from __future__ import annotations

from functools import partial

from poise_client._transport.client import AsyncClient, encode_each, encoding
from poise_client.codec import decode, encode
from poise_client.types import Batch, LearnerStatus, ModelExport, StepResult
from poise_proto.v1 import learner_pb2 as pb
from poise_proto.v1.learner_pb2_grpc import LearnerServiceStub

SUBMIT_TIMEOUT_S = 1800.0
EXPORT_TIMEOUT_S = 300.0
STATUS_TIMEOUT_S = 30.0


class AsyncLearnerClient(AsyncClient):
    """Trains the policy on rollouts with advantages."""

    service = "LearnerService"
    _stub = LearnerServiceStub

    async def submit_advantages(self, batch: Batch, *, timeout_s: float | None = None) -> StepResult:
        """Train on a batch, and return after the learner tried to push the weights to every replica.

        Repeating a batch id is safe: it returns the stored result with `duplicate` set.

        Args:
            batch: rollouts with advantages, or with rewards if the learner has a critic.
            timeout_s: deadline; 30 minutes by default.

        Raises:
            ConflictError: the learner has trained on this batch id with other content.
            TrainingStoppedError: the last updates were not finite. An operator must act.
            PoiseClientError: see `poise_client.errors`.
        """
        with encoding("batch"):
            header = pb.SubmitAdvantagesRequest(header=encode(batch, pb.BatchHeader))
        rollouts = encode_each(batch.rollouts, pb.TrainingRollout, "rollouts")
        messages = [header, *(pb.SubmitAdvantagesRequest(rollout=rollout) for rollout in rollouts)]
        attempts = self._attempts(timeout_s, SUBMIT_TIMEOUT_S)
        return await self._call("SubmitAdvantages", attempts, lambda: iter(messages), partial(decode, kind=StepResult))

    async def get_status(self, *, timeout_s: float | None = None) -> LearnerStatus:
        """Return the state of the learner. `timeout_s` is 30 s by default."""
        attempts = self._attempts(timeout_s, STATUS_TIMEOUT_S)
        return await self._call("GetStatus", attempts, pb.GetStatusRequest(), partial(decode, kind=LearnerStatus))

    async def export_model(self, name: str, *, check_only: bool = False, timeout_s: float | None = None) -> ModelExport:
        """Write the current policy to the Hugging Face folder `name` on the learner's file system.

        Args:
            name: name of the folder. An export with the same name is replaced.
            check_only: check whether the export would succeed, but leave no folder.
            timeout_s: deadline; 5 minutes by default.

        Raises:
            PoiseClientError: see `poise_client.errors`.
        """
        with encoding("name"):
            request = pb.ExportModelRequest(name=name, check_only=check_only)
        attempts = self._attempts(timeout_s, EXPORT_TIMEOUT_S)
        return await self._call("ExportModel", attempts, request, partial(decode, kind=ModelExport))
