"""The client of the learner service."""

from __future__ import annotations

from poise_client._client import AsyncClient, encoding
from poise_client.codec import (
    decode_learner_status,
    decode_model_export,
    decode_step_result,
    encode_batch_header,
    encode_training_rollout,
)
from poise_client.types import Batch, LearnerStatus, ModelExport, StepResult
from poise_proto.v1 import learner_pb2 as pb
from poise_proto.v1.learner_pb2_grpc import LearnerServiceStub

SUBMIT_TIMEOUT_S = 1800.0
EXPORT_TIMEOUT_S = 300.0
STATUS_TIMEOUT_S = 30.0


class AsyncLearnerClient(AsyncClient):
    """Gives the learner advantages to train on."""

    service = "LearnerService"

    async def submit_advantages(self, batch: Batch, *, timeout_s: float | None = None) -> StepResult:
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
        with encoding("batch"):
            requests = [pb.SubmitAdvantagesRequest(header=encode_batch_header(batch))]
        for i, rollout in enumerate(batch.rollouts):
            with encoding(f"rollouts[{i}]"):
                message = encode_training_rollout(rollout, f"rollouts[{i}]")
                requests.append(pb.SubmitAdvantagesRequest(rollout=message))
        return await self._call(
            "SubmitAdvantages",
            self._attempts(timeout_s, SUBMIT_TIMEOUT_S),
            lambda left_s: LearnerServiceStub(self._open()).SubmitAdvantages(
                iter(requests), timeout=left_s, metadata=self._dialer.metadata
            ),
            decode_step_result,
        )

    async def get_status(self, *, timeout_s: float | None = None) -> LearnerStatus:
        """Ask what the learner holds and does."""
        return await self._call(
            "GetStatus",
            self._attempts(timeout_s, STATUS_TIMEOUT_S),
            lambda left_s: LearnerServiceStub(self._open()).GetStatus(
                pb.GetStatusRequest(), timeout=left_s, metadata=self._dialer.metadata
            ),
            decode_learner_status,
        )

    async def export_model(self, name: str, *, check_only: bool = False, timeout_s: float | None = None) -> ModelExport:
        """Write the current policy as a Hugging Face folder `name` on the learner's file system.

        An export of the same name is replaced. `check_only` raises what an export would raise, and leaves nothing.
        `timeout_s` is 5 minutes by default.
        """
        with encoding("name"):
            request = pb.ExportModelRequest(name=name, check_only=check_only)
        return await self._call(
            "ExportModel",
            self._attempts(timeout_s, EXPORT_TIMEOUT_S),
            lambda left_s: LearnerServiceStub(self._open()).ExportModel(
                request, timeout=left_s, metadata=self._dialer.metadata
            ),
            decode_model_export,
        )
