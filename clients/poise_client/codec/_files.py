"""Batches and labels as bytes, for journals: the messages of the protocol, each with its length before it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from google.protobuf.proto import parse_length_prefixed, serialize_length_prefixed

from poise_client.codec._learner import (
    decode_batch_header,
    decode_training_rollout,
    encode_batch_header,
    encode_training_rollout,
)
from poise_client.codec._tensor import CodecError
from poise_client.codec._value import decode_labelled_group, encode_labelled_group
from poise_client.types import Batch, LabelledGroup
from poise_proto.v1 import learner_pb2, value_pb2

M = TypeVar("M", bound=Message)


def dump_batch(batch: Batch) -> bytes:
    """Return a batch as bytes: the same for the same batch."""
    out = io.BytesIO()
    serialize_length_prefixed(learner_pb2.SubmitAdvantagesRequest(header=encode_batch_header(batch)), out)
    for i, rollout in enumerate(batch.rollouts):
        message = encode_training_rollout(rollout, f"rollouts[{i}]")
        serialize_length_prefixed(learner_pb2.SubmitAdvantagesRequest(rollout=message), out)
    return out.getvalue()


def load_batch(content: bytes) -> Batch:
    """Rebuild a batch. Raises `CodecError` when the bytes are not what `dump_batch` gives."""
    messages = _parse(learner_pb2.SubmitAdvantagesRequest, content, "batch")
    first = next(messages, None)
    if first is None or first.WhichOneof("part") != "header":
        raise CodecError("header", "is missing; a batch begins with it")
    header = decode_batch_header(first.header)
    rollouts = [decode_training_rollout(message.rollout, f"rollouts[{i}]") for i, message in enumerate(messages)]
    if len(rollouts) != header.num_rollouts:
        raise CodecError("header.num_rollouts", f"is {header.num_rollouts}; {len(rollouts)} follow")
    return Batch(header.run_id, header.batch_id, header.step, tuple(rollouts), header.temperature)


def dump_labels(groups: Sequence[LabelledGroup]) -> bytes:
    """Return labelled groups as bytes."""
    out = io.BytesIO()
    for i, group in enumerate(groups):
        serialize_length_prefixed(encode_labelled_group(group, f"groups[{i}]"), out)
    return out.getvalue()


def load_labels(content: bytes) -> list[LabelledGroup]:
    """Rebuild labelled groups. Raises `CodecError` when the bytes are not what `dump_labels` gives."""
    messages = _parse(value_pb2.LabelledGroup, content, "labels")
    return [decode_labelled_group(message, f"groups[{i}]") for i, message in enumerate(messages)]


def _parse(kind: type[M], content: bytes, field: str) -> Iterator[M]:
    """Yield the messages that lie one after another. Raises `CodecError` for bytes that are cut short or none."""
    stream = io.BytesIO(content)
    while True:
        try:
            message = parse_length_prefixed(kind, stream)
        except (DecodeError, ValueError) as error:  # protobuf raises the latter for what is cut short
            raise CodecError(field, f"cannot be read: {error}") from error
        if message is None:
            return
        yield message
