"""Protobuf enums to and from their names in the SDK: `LEARNER_STATE_IDLE` is `"idle"`."""

from __future__ import annotations

from functools import cache
from typing import cast

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message

from poise_client.codec._tensor import CodecError
from poise_proto.v1 import generation_pb2 as pb


@cache
def enum_names(enum: EnumDescriptor) -> dict[int, str]:
    """Return the SDK's name of each number of an enum. 0, which means unset, is absent."""
    prefix = len(enum.values_by_number[0].name.removesuffix("UNSPECIFIED"))
    return {number: value.name[prefix:].lower() for number, value in enum.values_by_number.items() if number}


@cache
def enum_numbers(enum: EnumDescriptor) -> dict[str, int]:
    """Return the number of each name of an enum."""
    return {name: number for number, name in enum_names(enum).items()}


def read_enum(message: Message, name: str, path: str) -> str:
    """Return the name of an enum field's value. Raises `CodecError` naming `path` if it is unset or unknown."""
    enum = message.DESCRIPTOR.fields_by_name[name].enum_type
    number = getattr(message, name)
    try:
        return enum_names(enum)[number]
    except KeyError:
        names = ", ".join(enum_numbers(enum))
        raise CodecError(path, f"is {number or 'unset'}; required: one of {names}") from None


def enum_number(enum: EnumDescriptor, name: str, path: str) -> int:
    """Return the number of a name. Raises `CodecError` naming `path` if the enum has no such name."""
    numbers = enum_numbers(enum)
    if name not in numbers:
        raise CodecError(path, f"is {name!r:.60}; required: one of {', '.join(numbers)}")
    return numbers[name]


_BACKEND = pb.ProcessGroupBackend.DESCRIPTOR


def backend_number(name: str, path: str) -> pb.ProcessGroupBackend.ValueType:
    """Return the number of a process-group backend; an empty name is unset."""
    return cast(pb.ProcessGroupBackend.ValueType, enum_number(_BACKEND, name, path) if name else 0)


def backend_name(number: int) -> str:
    """Return the name of a process-group backend; empty if it is unset or unknown."""
    return enum_names(_BACKEND).get(number, "")
