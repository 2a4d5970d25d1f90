"""Serializes batches and labels for journals, as length-prefixed messages."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from google.protobuf.proto import parse_length_prefixed, serialize_length_prefixed

from poise_client.codec._mapper import decode, decode_fields, encode
from poise_client.codec._tensor import CodecError
from poise_client.types import Batch, Group, Rollout
from poise_proto.v1 import learner_pb2, value_pb2

M = TypeVar("M", bound=Message)


def dump_batch(batch: Batch) -> bytes:
    """Return a batch as bytes. Equal batches give equal bytes."""
    out = io.BytesIO()
    serialize_length_prefixed(learner_pb2.SubmitAdvantagesRequest(header=encode(batch, learner_pb2.BatchHeader)), out)
    for i, rollout in enumerate(batch.rollouts):
        message = encode(rollout, learner_pb2.TrainingRollout, f"rollouts[{i}]")
        serialize_length_prefixed(learner_pb2.SubmitAdvantagesRequest(rollout=message), out)
    return out.getvalue()


def load_batch(content: bytes) -> Batch:
    """Return the batch that `dump_batch` wrote. Raises `CodecError` for other bytes."""
    messages = _parse(learner_pb2.SubmitAdvantagesRequest, content, "batch")
    first = next(messages, None)
    if first is None or first.WhichOneof("part") != "header":
        raise CodecError("header", "is missing; a batch begins with it")
    rollouts = tuple(decode(message.rollout, Rollout, f"rollouts[{i}]") for i, message in enumerate(messages))
    if len(rollouts) != first.header.num_rollouts:
        raise CodecError("header.num_rollouts", f"is {first.header.num_rollouts}; {len(rollouts)} follow")
    return decode_fields(first.header, Batch, "header", rollouts=rollouts)


def dump_labels(groups: Sequence[Group]) -> bytes:
    """Return labelled groups as bytes: their features and rewards, without their tokens."""
    out = io.BytesIO()
    for i, group in enumerate(groups):
        serialize_length_prefixed(encode(group, value_pb2.LabelledGroup, f"groups[{i}]"), out)
    return out.getvalue()


def load_labels(content: bytes) -> list[Group]:
    """Return the labelled groups that `dump_labels` wrote. Raises `CodecError` for other bytes."""
    messages = _parse(value_pb2.LabelledGroup, content, "labels")
    return [decode(message, Group, f"groups[{i}]") for i, message in enumerate(messages)]


def _parse(kind: type[M], content: bytes, field: str) -> Iterator[M]:
    """Yield length-prefixed messages. Raise `CodecError` if the bytes are truncated or something else."""
    stream = io.BytesIO(content)
    while True:
        try:
            message = parse_length_prefixed(kind, stream)
        except (DecodeError, ValueError, OverflowError) as error:  # the last two for a wrong length
            raise CodecError(field, f"cannot be read: {error}") from error
        if message is None:
            return
        yield message
