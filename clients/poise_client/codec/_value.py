"""Messages of value.proto: features to be valued, baselines, labels, probes."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

from poise_client.codec._common import DEFAULT_DOMAIN, decode_features, encode_features, join, vector
from poise_client.codec._tensor import CodecError, from_tensor
from poise_client.types import (
    CalibrationBin,
    Features,
    GroupBaselines,
    GroupFeatures,
    LabelledGroup,
    ProbeQuality,
    ProbeReport,
    ProbeStatus,
    PromptFeatures,
    PromptScore,
)
from poise_proto.v1 import common_pb2
from poise_proto.v1 import value_pb2 as pb

LABEL_SCHEMA_VERSION = 2
"""Schema of LabelledGroup that this code writes, and the only one it reads."""


def _encode_rollouts(rollouts: Iterable[Features], field: str) -> list[common_pb2.RolloutFeatures]:
    return [encode_features(features, join(field, f"rollouts[{i}]")) for i, features in enumerate(rollouts)]


def _decode_rollouts(
    messages: RepeatedCompositeFieldContainer[common_pb2.RolloutFeatures], field: str
) -> tuple[Features, ...]:
    return tuple(decode_features(message, join(field, f"rollouts[{i}]")) for i, message in enumerate(messages))


def encode_group_features(group: GroupFeatures, field: str = "group") -> pb.GroupFeatures:
    """Pack the features of a group that is to be valued. Raises `CodecError` for rewards that are not one a rollout."""
    rewards = None
    if group.rewards is not None:
        rewards = vector(group.rewards, join(field, "rewards"))
        _check_one_each(rewards.shape[0], len(group.rollouts), field)
    return pb.GroupFeatures(
        group_id=group.group_id,
        domain=group.domain,
        rollouts=_encode_rollouts(group.rollouts, field),
        rewards=rewards,
    )


def decode_group_features(message: pb.GroupFeatures, field: str = "group") -> GroupFeatures:
    """Unpack the features of a group that is to be valued; no domain means "default".

    Raises:
        CodecError: malformed features, or rewards that are not one a rollout.
    """
    rollouts = _decode_rollouts(message.rollouts, field)
    rewards = None
    if message.HasField("rewards"):
        rewards = from_tensor(message.rewards, field=join(field, "rewards"))
        _check_one_each(rewards.size, len(rollouts), field)
    return GroupFeatures(message.group_id, message.domain or DEFAULT_DOMAIN, rollouts, rewards)


def _check_one_each(num_rewards: int, num_rollouts: int, field: str) -> None:
    if num_rewards != num_rollouts:
        raise CodecError(join(field, "rewards"), f"has {num_rewards} elements for {num_rollouts} rollouts")


def encode_group_baselines(group: GroupBaselines, field: str = "group") -> pb.GroupBaselines:
    """Pack the answer for a group."""
    if group.values is None:
        return pb.GroupBaselines(
            group_id=group.group_id, status=pb.ESTIMATE_STATUS_NO_PROBE, up_to_date=group.up_to_date
        )
    return pb.GroupBaselines(
        group_id=group.group_id,
        status=pb.ESTIMATE_STATUS_OK,
        values=vector(group.values, join(field, "values")),
        baselines=None if group.baselines is None else vector(group.baselines, join(field, "baselines")),
        probe_version=group.probe_version,
        up_to_date=group.up_to_date,
    )


def decode_group_baselines(message: pb.GroupBaselines, field: str = "group") -> GroupBaselines:
    """Unpack the answer for a group. Raises `CodecError` for an unset status or mismatched lengths."""
    if message.status == pb.ESTIMATE_STATUS_NO_PROBE:
        return GroupBaselines(message.group_id, 0, None, None, message.up_to_date)
    if message.status != pb.ESTIMATE_STATUS_OK:
        raise CodecError(join(field, "status"), f"is unset or unknown ({message.status})")
    values = from_tensor(message.values, field=join(field, "values"))
    baselines = None
    if message.HasField("baselines"):
        baselines = from_tensor(message.baselines, field=join(field, "baselines"))
        if baselines.shape != values.shape:
            raise CodecError(join(field, "baselines"), f"has {baselines.size} elements for {values.size} values")
    return GroupBaselines(message.group_id, message.probe_version, values, baselines, message.up_to_date)


def encode_prompt_features(prompt: PromptFeatures, field: str = "prompt") -> pb.PromptFeatures:
    """Pack the state of a prompt that is to be valued."""
    return pb.PromptFeatures(
        group_id=prompt.group_id,
        domain=prompt.domain,
        prompt_hidden=vector(prompt.prompt_hidden, join(field, "prompt_hidden")),
    )


def decode_prompt_features(message: pb.PromptFeatures, field: str = "prompt") -> PromptFeatures:
    """Unpack the state of a prompt that is to be valued; no domain means "default"."""
    prompt_hidden = from_tensor(message.prompt_hidden, field=join(field, "prompt_hidden"))
    return PromptFeatures(message.group_id, message.domain or DEFAULT_DOMAIN, prompt_hidden)


def encode_prompt_score(score: PromptScore) -> pb.PromptScore:
    """Pack the answer for a prompt."""
    if score.value is None:
        return pb.PromptScore(group_id=score.group_id, status=pb.ESTIMATE_STATUS_NO_PROBE)
    return pb.PromptScore(
        group_id=score.group_id,
        status=pb.ESTIMATE_STATUS_OK,
        value=score.value,
        probe_version=score.probe_version,
    )


def decode_prompt_score(message: pb.PromptScore, field: str = "prompt") -> PromptScore:
    """Unpack the answer for a prompt. Raises `CodecError` for an unset status."""
    if message.status == pb.ESTIMATE_STATUS_NO_PROBE:
        return PromptScore(message.group_id, 0, None)
    if message.status != pb.ESTIMATE_STATUS_OK:
        raise CodecError(join(field, "status"), f"is unset or unknown ({message.status})")
    return PromptScore(message.group_id, message.probe_version, message.value)


def encode_labelled_group(group: LabelledGroup, field: str = "group") -> pb.LabelledGroup:
    """Pack a labelled group, as it travels and as the queue stores it."""
    return pb.LabelledGroup(
        schema_version=LABEL_SCHEMA_VERSION,
        run_id=group.run_id,
        step=group.step,
        group_id=group.group_id,
        domain=group.domain,
        rollouts=_encode_rollouts(group.rollouts, field),
        rewards=vector(group.rewards, join(field, "rewards")),
        num_rollouts=group.num_rollouts,
    )


def decode_labelled_group(message: pb.LabelledGroup, field: str = "group") -> LabelledGroup:
    """Unpack a labelled group; no domain means "default".

    Raises:
        CodecError: another schema version, malformed features, or not one reward a rollout.
    """
    if message.schema_version != LABEL_SCHEMA_VERSION:
        raise CodecError(
            join(field, "schema_version"), f"is {message.schema_version}; required: {LABEL_SCHEMA_VERSION}"
        )
    rollouts = _decode_rollouts(message.rollouts, field)
    rewards = from_tensor(message.rewards, field=join(field, "rewards"))
    _check_one_each(rewards.size, len(rollouts), field)
    return LabelledGroup(
        message.run_id,
        message.step,
        message.group_id,
        message.domain or DEFAULT_DOMAIN,
        rollouts,
        rewards,
        message.num_rollouts,
    )


def _encode_quality(quality: ProbeQuality) -> pb.ProbeQuality:
    bins = [
        pb.CalibrationBin(predicted=one.predicted, realised=one.realised, count=one.count)
        for one in quality.calibration
    ]
    return pb.ProbeQuality(calibration=bins, **{name: getattr(quality, name) for name in _QUALITY_NUMBERS})


def _decode_quality(message: pb.ProbeQuality) -> ProbeQuality:
    bins = tuple(CalibrationBin(one.predicted, one.realised, one.count) for one in message.calibration)
    return ProbeQuality(calibration=bins, **{name: getattr(message, name) for name in _QUALITY_NUMBERS})


_QUALITY_NUMBERS = (
    "num_rows",
    "pearson",
    "brier",
    "brier_skill",
    "bias",
    "share_clipped",
    "variance_vs_none",
    "variance_vs_rloo",
    "variance_vs_batch_mean",
)


def _encode_probe_status(status: ProbeStatus) -> pb.ProbeStatus:
    return pb.ProbeStatus(
        domain=status.domain,
        probe_version=status.probe_version,
        num_groups=status.num_groups,
        num_rows=status.num_rows,
        num_steps_seen=status.num_steps_seen,
        warmup_steps=status.warmup_steps,
        last_fit_s=status.last_fit_s,
        label_lag_s=status.label_lag_s,
        quality=_encode_quality(status.quality),
    )


def _decode_probe_status(message: pb.ProbeStatus) -> ProbeStatus:
    return ProbeStatus(
        domain=message.domain,
        probe_version=message.probe_version,
        num_groups=message.num_groups,
        num_rows=message.num_rows,
        num_steps_seen=message.num_steps_seen,
        warmup_steps=message.warmup_steps,
        last_fit_s=message.last_fit_s,
        label_lag_s=message.label_lag_s,
        quality=_decode_quality(message.quality),
    )


def encode_probe_report(report: ProbeReport) -> pb.GetProbeResponse:
    """Pack the state of the probes."""
    return pb.GetProbeResponse(
        probes=[_encode_probe_status(status) for status in report.probes],
        num_groups_consumed=report.num_groups_consumed,
        num_duplicates=report.num_duplicates,
        num_dead_letters=report.num_dead_letters,
        num_pending=report.num_pending,
    )


def decode_probe_report(message: pb.GetProbeResponse) -> ProbeReport:
    """Unpack the state of the probes."""
    return ProbeReport(
        tuple(_decode_probe_status(status) for status in message.probes),
        message.num_groups_consumed,
        message.num_duplicates,
        message.num_dead_letters,
        message.num_pending,
    )
