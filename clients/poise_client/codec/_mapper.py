"""Converts dataclasses to and from messages, field by field.

Fields that both the dataclass and the message have are copied. The two declarations determine the conversion:

    message                     dataclass
    Tensor                      Floats, Halves or Ints, 1 axis
    enum                        its name in lower case, without the prefix: LEARNER_STATE_IDLE is "idle"
    message, repeated message   dataclass, tuple of dataclasses
    map, repeated scalar        dict (enum values as names), tuple
    unset optional field        the default of the dataclass

`_converters` registers all other conversions here, by type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from operator import attrgetter
from typing import Any, Literal, TypeVar, cast, get_args, get_type_hints

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from poise_client.codec._tensor import CodecError, from_tensor, vector
from poise_client.types import Halves, Ints
from poise_proto.v1 import common_pb2

T = TypeVar("T")
M = TypeVar("M", bound=Message)

Encoder = Callable[[Any, str], Any]
"""Returns the content of a message field. Takes the dataclass field's value, and its path for errors."""
Decoder = Callable[[Any, str], Any]
"""Returns the value of a dataclass field. Takes the whole message, and the field's path for errors."""

_ENCODERS: dict[type, Callable[[Any, type[Any], str], Any]] = {}
_DECODERS: dict[type, Callable[[Any, str], Any]] = {}


def encode(value: object, kind: type[M], path: str = "") -> M:
    """Return a dataclass as a message of type `kind`. Raises `CodecError`, which names the field under `path`."""
    encoder = _ENCODERS.get(type(value))
    return encode_fields(value, kind, path) if encoder is None else cast(M, encoder(value, kind, path))


def decode(message: Message, kind: type[T], path: str = "") -> T:
    """Return a message as a dataclass of type `kind`. Raises `CodecError`, which names the field under `path`."""
    decoder = _DECODERS.get(kind)
    return decode_fields(message, kind, path) if decoder is None else cast(T, decoder(message, path))


def encode_fields(value: object, kind: type[M], path: str = "", **more: Any) -> M:
    """Return a dataclass as a message. `more` sets fields; all other shared fields are copied."""
    prefix = f"{path}." if path else ""
    for name, encoder in _plan(cast(Any, type(value)), kind.DESCRIPTOR)[0]:
        if name not in more and (content := getattr(value, name)) is not None:
            more[name] = content if encoder is None else encoder(content, prefix + name)
    return kind(**more)


def decode_fields(message: Message, kind: type[T], path: str = "", **more: Any) -> T:
    """Return a message as a dataclass. `more` sets fields; all other shared fields are copied."""
    prefix = f"{path}." if path else ""
    for name, decoder in _plan(cast(Any, kind), message.DESCRIPTOR)[1]:
        if name not in more:
            more[name] = getattr(message, name) if decoder is None else decoder(message, prefix + name)
    return kind(**more)


def register(
    kind: type[T],
    encoder: Callable[[T, type[Any], str], Any] | None = None,
    decoder: Callable[[Any, str], T] | None = None,
) -> None:
    """Register functions that convert `kind`, instead of `encode_fields` and `decode_fields`."""
    if encoder is not None:
        _ENCODERS[kind] = encoder
    if decoder is not None:
        _DECODERS[kind] = decoder


def join(prefix: str, field: str) -> str:
    """Return the path of `field` within the message at path `prefix`."""
    return f"{prefix}.{field}" if prefix else field


def enum_name(enum: EnumDescriptor, number: int, path: str) -> str:
    """Return the SDK's name of an enum value. Raises `CodecError` if it is unset or unknown."""
    names = _enum_names(enum)
    if number not in names:
        raise CodecError(path, f"is {number or 'unset'}; required: one of {', '.join(names.values())}")
    return names[number]


def enum_number(enum: EnumDescriptor, name: str, path: str) -> int:
    """Return the number of an enum value's name. Raises `CodecError` if the enum has no such name."""
    for number, known in _enum_names(enum).items():
        if known == name:
            return number
    raise CodecError(path, f"is {name!r:.60}; required: one of {', '.join(_enum_names(enum).values())}")


@cache
def _enum_names(enum: EnumDescriptor) -> dict[int, str]:
    prefix = len(enum.values_by_number[0].name.removesuffix("UNSPECIFIED"))
    return {number: value.name[prefix:].lower() for number, value in enum.values_by_number.items() if number}


@cache
def _plan(cls: Any, descriptor: Any) -> tuple[list[tuple[str, Encoder | None]], list[tuple[str, Decoder | None]]]:
    """Return the encoder and the decoder of each shared field; None copies the field."""
    hints = get_type_hints(cls)
    fields = [field for field in dataclasses.fields(cls) if field.name in descriptor.fields_by_name]
    encoders, decoders = [], []
    for field in fields:
        hint, wire = hints[field.name], descriptor.fields_by_name[field.name]
        encoders.append((field.name, _encoder(hint, wire)))
        decoders.append((field.name, _decoder(field, hint, wire)))
    return encoders, decoders


def _is_map(wire: FieldDescriptor) -> bool:
    return wire.message_type is not None and wire.message_type.GetOptions().map_entry


def _enum_of_map(wire: FieldDescriptor) -> EnumDescriptor | None:
    """Return the enum of a map's values, if they are one."""
    entry = wire.message_type
    return entry.fields_by_name["value"].enum_type if entry is not None and _is_map(wire) else None


def _tensor_dtype(hint: Any) -> Literal["int32", "float16", "float32"]:
    hints = (hint, *get_args(hint))
    return "int32" if Ints in hints else "float16" if Halves in hints else "float32"


def _encoder(hint: Any, wire: FieldDescriptor) -> Encoder | None:
    if (enum := wire.enum_type) is not None:
        return lambda name, path: enum_number(enum, name, path) if name else 0
    if (values := _enum_of_map(wire)) is not None:
        return lambda names, path: {key: enum_number(values, name, path) for key, name in names.items()}
    if wire.message_type is None or _is_map(wire):
        return None
    kind = GetMessageClass(wire.message_type)
    if kind is common_pb2.Tensor:
        dtype = _tensor_dtype(hint)
        return lambda array, path: vector(array, path, dtype)
    cls = _dataclass(hint)
    if (names := _plain_fields(cls, wire.message_type)) is not None:
        get = attrgetter(*names)
        if wire.is_repeated:
            return lambda values, path: [kind(**dict(zip(names, get(value), strict=True))) for value in values]
        return lambda value, path: kind(**dict(zip(names, get(value), strict=True)))
    if wire.is_repeated:
        return lambda values, path: [encode(value, kind, f"{path}[{i}]") for i, value in enumerate(values)]
    return lambda value, path: encode(value, kind, path)


def _decoder(field: dataclasses.Field[Any], hint: Any, wire: FieldDescriptor) -> Decoder | None:
    name, convert = field.name, _converter(hint, wire)
    if wire.enum_type is not None and field.default == "":
        return lambda message, path: convert(getattr(message, name), path) if getattr(message, name) else ""
    default = None if field.default is dataclasses.MISSING else field.default
    if wire.has_presence and (type(None) in get_args(hint) or not wire.message_type):
        return lambda message, path: convert(getattr(message, name), path) if message.HasField(name) else default
    return None if convert is _copy else lambda message, path: convert(getattr(message, name), path)


def _converter(hint: Any, wire: FieldDescriptor) -> Callable[[Any, str], Any]:
    """Return the converter for the content of a field that is set."""
    if (enum := wire.enum_type) is not None:
        return lambda number, path: enum_name(enum, number, path)
    if wire.message_type is None:
        return (lambda items, path: tuple(items)) if wire.is_repeated else _copy
    if (values := _enum_of_map(wire)) is not None:
        return lambda entries, path: {key: enum_name(values, number, path) for key, number in entries.items()}
    if _is_map(wire):
        return lambda entries, path: dict(entries)
    if GetMessageClass(wire.message_type) is common_pb2.Tensor:
        dtype = _tensor_dtype(hint)
        return lambda tensor, path: from_tensor(tensor, dtype=dtype, field=path)
    kind = _dataclass(hint)
    if (names := _plain_fields(kind, wire.message_type)) is not None:
        get = attrgetter(*names)
        if wire.is_repeated:
            return lambda items, path: tuple([kind(*get(item)) for item in items])
        return lambda message, path: kind(*get(message))
    if wire.is_repeated:
        return lambda items, path: tuple(decode(item, kind, f"{path}[{i}]") for i, item in enumerate(items))
    return lambda message, path: decode(message, kind, path)


def _dataclass(hint: Any) -> Any:
    """Return the dataclass in a type hint such as `tuple[VersionSpan, ...]`."""
    return next((each for each in get_args(hint) if isinstance(each, type) and each is not type(None)), hint)


def _plain_fields(cls: Any, descriptor: Any) -> tuple[str, ...] | None:
    """Return the fields of a dataclass if all are copied unchanged, as for `RolloutId`; else None.

    Such a dataclass needs no checks, so it is converted at once, without paths for errors.
    """
    if cls in _ENCODERS or cls in _DECODERS or not dataclasses.is_dataclass(cls):
        return None
    names = tuple(field.name for field in dataclasses.fields(cls))
    encoders, decoders = _plan(cast(Any, cls), descriptor)
    are_plain = [converter is None for _, converter in (*encoders, *decoders)]
    return names if all(are_plain) and len(are_plain) == 2 * len(names) > 2 else None


def _copy(content: Any, path: str) -> Any:
    return content
