"""Messages of common.proto: names, version spans, features."""

from __future__ import annotations

from numpy.typing import ArrayLike

from poise_client.codec._tensor import CodecError, DTypeName, from_tensor, to_tensor
from poise_client.types import EntropyStats, Features, Floats, RolloutId, VersionSpan
from poise_proto.v1 import common_pb2 as pb

DEFAULT_DOMAIN = "default"
"""The domain of a group that names none."""


def join(prefix: str, field: str) -> str:
    """Return the path of `field` within the message at path `prefix`."""
    return f"{prefix}.{field}" if prefix else field


def vector(array: ArrayLike, field: str, dtype: DTypeName = "float32") -> pb.Tensor:
    """Pack an array that must have one axis."""
    tensor = to_tensor(array, dtype, field=field)
    if len(tensor.shape) != 1:
        raise CodecError(field, f"has shape {list(tensor.shape)}; required: 1 axis")
    return tensor


def encode_rollout_id(rollout_id: RolloutId) -> pb.RolloutId:
    """Pack a rollout's name."""
    return pb.RolloutId(
        run_id=rollout_id.run_id,
        step=rollout_id.step,
        group_id=rollout_id.group_id,
        rollout_index=rollout_id.rollout_index,
    )


def decode_rollout_id(message: pb.RolloutId) -> RolloutId:
    """Unpack a rollout's name."""
    return RolloutId(message.run_id, message.step, message.group_id, message.rollout_index)


def encode_version_span(span: VersionSpan) -> pb.VersionSpan:
    """Pack a version span."""
    return pb.VersionSpan(start_token=span.start_token, end_token=span.end_token, policy_version=span.policy_version)


def decode_version_span(message: pb.VersionSpan) -> VersionSpan:
    """Unpack a version span."""
    return VersionSpan(message.start_token, message.end_token, message.policy_version)


def _encode_entropy(stats: EntropyStats) -> pb.EntropyStats:
    return pb.EntropyStats(mean=stats.mean, last=stats.last, max=stats.max, min=stats.min)


def _decode_entropy(message: pb.EntropyStats) -> EntropyStats:
    return EntropyStats(message.mean, message.last, message.max, message.min)


def encode_features(features: Features, field: str = "features") -> pb.RolloutFeatures:
    """Pack a rollout's features. Raises `CodecError` for arrays that are not one axis of floats."""
    return pb.RolloutFeatures(
        prompt_hidden=vector(features.prompt_hidden, join(field, "prompt_hidden")),
        response_hidden=vector(features.response_hidden, join(field, "response_hidden")),
        output_entropy=_encode_entropy(features.output_entropy),
        reasoning_entropy=_encode_entropy(features.reasoning_entropy),
        answer_entropy=_encode_entropy(features.answer_entropy),
    )


def decode_features(message: pb.RolloutFeatures, field: str = "features") -> Features:
    """Unpack a rollout's features. Raises what `decode_hidden` does."""
    return Features(
        *decode_hidden(message, field),
        _decode_entropy(message.output_entropy),
        _decode_entropy(message.reasoning_entropy),
        _decode_entropy(message.answer_entropy),
    )


def decode_hidden(message: pb.RolloutFeatures, field: str = "features") -> tuple[Floats, Floats]:
    """Unpack a rollout's two hidden states, of the prompt and of the response.

    Raises:
        CodecError: a missing or malformed state, or two of different width.
    """
    prompt_hidden = from_tensor(message.prompt_hidden, field=join(field, "prompt_hidden"))
    response_hidden = from_tensor(message.response_hidden, field=join(field, "response_hidden"))
    if prompt_hidden.shape != response_hidden.shape:
        raise CodecError(
            join(field, "response_hidden"),
            f"is {response_hidden.size} wide and prompt_hidden {prompt_hidden.size}; required: both the model's width",
        )
    return prompt_hidden, response_hidden
