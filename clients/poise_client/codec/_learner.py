"""Messages of learner.proto: batches, step results, status."""

from __future__ import annotations

from typing import cast

from poise_client.codec._common import (
    decode_rollout_id,
    decode_version_span,
    encode_rollout_id,
    encode_version_span,
    join,
    vector,
)
from poise_client.codec._enums import enum_number, read_enum
from poise_client.codec._tensor import CodecError, from_tensor
from poise_client.types import (
    Batch,
    BatchHeader,
    LearnerStatus,
    ModelExport,
    ReplicaResult,
    StepMetrics,
    StepResult,
    TrainingRollout,
)
from poise_proto.v1 import learner_pb2 as pb


def encode_batch_header(batch: Batch) -> pb.BatchHeader:
    """Pack what opens a batch; its rollouts follow one by one."""
    return pb.BatchHeader(
        run_id=batch.run_id,
        batch_id=batch.batch_id,
        step=batch.step,
        num_rollouts=len(batch.rollouts),
        temperature=batch.temperature,
    )


def decode_batch_header(message: pb.BatchHeader) -> BatchHeader:
    """Unpack what opens a batch; an unset temperature is 1."""
    return BatchHeader(
        run_id=message.run_id,
        batch_id=message.batch_id,
        step=message.step,
        num_rollouts=message.num_rollouts,
        temperature=message.temperature if message.HasField("temperature") else 1.0,
    )


def encode_training_rollout(rollout: TrainingRollout, field: str = "rollout") -> pb.TrainingRollout:
    """Pack a rollout with its advantage or reward."""
    return pb.TrainingRollout(
        id=encode_rollout_id(rollout.id),
        prompt_token_ids=vector(rollout.prompt_token_ids, join(field, "prompt_token_ids"), "int32"),
        token_ids=vector(rollout.token_ids, join(field, "token_ids"), "int32"),
        logprobs=vector(rollout.logprobs, join(field, "logprobs")),
        advantage=rollout.advantage,
        version_spans=[encode_version_span(span) for span in rollout.version_spans],
        reward=rollout.reward,
    )


def decode_training_rollout(message: pb.TrainingRollout, field: str = "rollout") -> TrainingRollout:
    """Unpack a rollout with its advantage or reward. Raises `CodecError` for malformed arrays or mismatched lengths."""
    token_ids = from_tensor(message.token_ids, dtype="int32", field=join(field, "token_ids"))
    logprobs = from_tensor(message.logprobs, field=join(field, "logprobs"))
    if logprobs.shape != token_ids.shape:
        raise CodecError(
            join(field, "logprobs"),
            f"has {logprobs.size} elements for {token_ids.size} response tokens; required: one each",
        )
    return TrainingRollout(
        id=decode_rollout_id(message.id),
        prompt_token_ids=from_tensor(message.prompt_token_ids, dtype="int32", field=join(field, "prompt_token_ids")),
        token_ids=token_ids,
        logprobs=logprobs,
        advantage=message.advantage,
        version_spans=tuple(decode_version_span(span) for span in message.version_spans),
        reward=message.reward if message.HasField("reward") else None,
    )


def encode_step_metrics(metrics: StepMetrics) -> pb.StepMetrics:
    """Pack the numbers of a step."""
    return pb.StepMetrics(
        loss=metrics.loss,
        entropy=metrics.entropy,
        mismatch_logprob=metrics.mismatch_logprob,
        mismatch_kl=metrics.mismatch_kl,
        clip_share=metrics.clip_share,
        truncated_share=metrics.truncated_share,
        gradient_norm=metrics.gradient_norm,
        learning_rate=metrics.learning_rate,
        num_tokens=metrics.num_tokens,
        num_rollouts=metrics.num_rollouts,
        num_updates=metrics.num_updates,
        staleness=metrics.staleness,
        train_s=metrics.train_s,
        publish_s=metrics.publish_s,
        reference_kl=metrics.reference_kl,
        clip_low_share=metrics.clip_low_share,
        clip_high_share=metrics.clip_high_share,
        dual_clip_share=metrics.dual_clip_share,
        num_skipped_updates=metrics.num_skipped_updates,
        num_model_tokens=metrics.num_model_tokens,
        tokens_per_s=metrics.tokens_per_s,
        mfu=metrics.mfu,
        value_loss=metrics.value_loss,
        explained_variance=metrics.explained_variance,
        critic_gradient_norm=metrics.critic_gradient_norm,
        gradient_variance=metrics.gradient_variance,
    )


def decode_step_metrics(message: pb.StepMetrics) -> StepMetrics:
    """Unpack the numbers of a step."""
    return StepMetrics(
        loss=message.loss,
        entropy=message.entropy,
        mismatch_logprob=message.mismatch_logprob,
        mismatch_kl=message.mismatch_kl,
        clip_share=message.clip_share,
        truncated_share=message.truncated_share,
        gradient_norm=message.gradient_norm,
        learning_rate=message.learning_rate,
        num_tokens=message.num_tokens,
        num_rollouts=message.num_rollouts,
        num_updates=message.num_updates,
        staleness=dict(message.staleness),
        train_s=message.train_s,
        publish_s=message.publish_s,
        reference_kl=message.reference_kl,
        clip_low_share=message.clip_low_share,
        clip_high_share=message.clip_high_share,
        dual_clip_share=message.dual_clip_share,
        num_skipped_updates=message.num_skipped_updates,
        num_model_tokens=message.num_model_tokens,
        tokens_per_s=message.tokens_per_s,
        mfu=message.mfu,
        value_loss=message.value_loss,
        explained_variance=message.explained_variance,
        critic_gradient_norm=message.critic_gradient_norm,
        gradient_variance=message.gradient_variance,
    )


def encode_replica_result(result: ReplicaResult) -> pb.ReplicaResult:
    """Pack how the publishing to a replica went."""
    return pb.ReplicaResult(
        address=result.address,
        policy_version=result.policy_version,
        current=result.current,
        error=result.error,
        push_s=result.push_s,
        pause_s=result.pause_s,
        digest=result.digest,
        sent_bytes=result.sent_bytes,
    )


def decode_replica_result(message: pb.ReplicaResult) -> ReplicaResult:
    """Unpack how the publishing to a replica went."""
    return ReplicaResult(
        address=message.address,
        policy_version=message.policy_version,
        current=message.current,
        error=message.error,
        push_s=message.push_s,
        pause_s=message.pause_s,
        digest=message.digest,
        sent_bytes=message.sent_bytes,
    )


def _reason_number(reason: str, path: str) -> pb.RejectionReason.ValueType:
    return cast(pb.RejectionReason.ValueType, enum_number(pb.RejectionReason.DESCRIPTOR, reason, path))


def encode_step_result(result: StepResult) -> pb.SubmitAdvantagesResponse:
    """Pack the outcome of a batch."""
    return pb.SubmitAdvantagesResponse(
        policy_version=result.policy_version,
        duplicate=result.duplicate,
        metrics=encode_step_metrics(result.metrics),
        rejected=[
            pb.RejectedRollout(id=encode_rollout_id(rollout), reason=_reason_number(reason, f"rejected[{i}].reason"))
            for i, (rollout, reason) in enumerate(result.rejected)
        ],
        replicas=[encode_replica_result(replica) for replica in result.replicas],
    )


def decode_step_result(message: pb.SubmitAdvantagesResponse) -> StepResult:
    """Unpack the outcome of a batch."""
    return StepResult(
        policy_version=message.policy_version,
        duplicate=message.duplicate,
        metrics=decode_step_metrics(message.metrics),
        rejected=tuple(
            (decode_rollout_id(rejected.id), read_enum(rejected, "reason", f"rejected[{i}].reason"))
            for i, rejected in enumerate(message.rejected)
        ),
        replicas=tuple(decode_replica_result(replica) for replica in message.replicas),
    )


def encode_learner_status(status: LearnerStatus) -> pb.GetStatusResponse:
    """Pack the learner's status."""
    return pb.GetStatusResponse(
        lineage_id=status.lineage_id,
        policy_version=status.policy_version,
        checkpoint_version=status.checkpoint_version,
        state=cast(pb.LearnerState.ValueType, enum_number(pb.LearnerState.DESCRIPTOR, status.state, "state")),
        num_batches=status.num_batches,
        num_rollouts=status.num_rollouts,
        num_rejected=[
            pb.RejectionCount(reason=_reason_number(reason, "num_rejected"), count=count)
            for reason, count in status.num_rejected.items()
        ],
        model=status.model,
        max_staleness=status.max_staleness,
        replicas=[encode_replica_result(replica) for replica in status.replicas],
        digest=status.digest,
        last_batch_id=status.last_batch_id,
        has_critic=status.has_critic,
    )


def decode_learner_status(message: pb.GetStatusResponse) -> LearnerStatus:
    """Unpack the learner's status."""
    return LearnerStatus(
        lineage_id=message.lineage_id,
        policy_version=message.policy_version,
        checkpoint_version=message.checkpoint_version,
        state=read_enum(message, "state", "state"),
        num_batches=message.num_batches,
        num_rollouts=message.num_rollouts,
        num_rejected={read_enum(one, "reason", "num_rejected.reason"): one.count for one in message.num_rejected},
        model=message.model,
        max_staleness=message.max_staleness,
        replicas=tuple(decode_replica_result(replica) for replica in message.replicas),
        digest=message.digest,
        last_batch_id=message.last_batch_id,
        has_critic=message.has_critic,
    )


def encode_model_export(export: ModelExport) -> pb.ExportModelResponse:
    """Pack where an export lies."""
    return pb.ExportModelResponse(path=export.path, policy_version=export.policy_version)


def decode_model_export(message: pb.ExportModelResponse) -> ModelExport:
    """Unpack where an export lies."""
    return ModelExport(message.path, message.policy_version)
