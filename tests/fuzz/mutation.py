"""Mutates messages: their fields, by descriptor, and their encoded bytes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message

HUGE_SHARE = 0.004
"""Share of mutations that make a message large. They cost a hundred times the others."""

STRINGS = (
    *("", "\0", "a\0b", "x" * 129, "../../../etc/passwd", "/dev/null", "/proc/self/mem", "%s%n", "{{7*7}}", "' OR 1=1"),
    *("\ufeff", "\u202e", "🙈" * 40, "e\u0301" * 30, "a\nb\r\nc", "null", "NaN", "-1", "1e999", "*", "a b", "default"),
    *("/" + "x" * 300, "/x" * 3000, "\U0010ffff", "٣", "ﬁ", "İ", " ", "\t", ".", "..", "-", "_", "r", "g", "fuzz"),
)
INTEGERS = (
    0,
    1,
    2,
    3,
    7,
    63,
    64,
    255,
    256,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
FLOATS = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1e-45,
    1e-7,
    1e30,
    -1e30,
    3.4e38,
    1.8e308,
    math.nan,
    math.inf,
    -math.inf,
    600.0,
    1e-3,
)

Site = Callable[[random.Random], None]


def mutated(message: Message, random_: random.Random) -> bytes:
    """Return an encoded message with up to three fields, or its bytes, mutated. Changes `message` too."""
    for _ in range(random_.choice((0, 1, 1, 1, 2, 3))):
        if sites := list(_sites(message)):
            random_.choice(sites)(random_)
    data = message.SerializeToString()
    if random_.random() < 0.15:
        data = random_.choice((_truncated, _flipped, _spliced, _unknown_field, _garbage, _nested))(data, random_)
    return data


def _sites(message: Message) -> Iterator[Site]:
    """Yield a mutation for every field of a message, set or not, and of its nested messages."""
    for field in message.DESCRIPTOR.fields:
        yield _site(message, field)
        if field.type != Field.TYPE_MESSAGE or _is_map(field):
            continue
        if field.is_repeated:
            inner = list(getattr(message, field.name))[:4]
        else:
            inner = [getattr(message, field.name)] if message.HasField(field.name) else []
        for one in inner:
            yield from _sites(one)


def _is_map(field: Field) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _site(message: Message, field: Field) -> Site:
    if field.is_repeated:
        return lambda random_: _change_repeated(message, field, random_)
    return lambda random_: _change_single(message, field, random_)


def _change_single(message: Message, field: Field, random_: random.Random) -> None:
    if random_.random() < 0.2:
        message.ClearField(field.name)
    elif field.type == Field.TYPE_MESSAGE:
        getattr(message, field.name).SetInParent()
    else:
        setattr(message, field.name, _value(field, random_))


def _change_repeated(message: Message, field: Field, random_: random.Random) -> None:
    values: Any = getattr(message, field.name)
    match random_.randrange(6):
        case 0:
            message.ClearField(field.name)
        case 1 if values:
            del values[random_.randrange(len(values))]
        case 2 if values:
            del values[random_.randrange(len(values)) :]
        case 3 if values:
            _repeat(values, random_)
        case 4 if len(values) > 1:
            values.reverse()
        case _ if field.type == Field.TYPE_MESSAGE:
            values.add()
        case _:
            values.append(_value(field, random_))


def _repeat(values: Any, random_: random.Random) -> None:
    one = values[random_.randrange(len(values))]
    count = random_.choice((1, 1, 2, 5, 40))
    if random_.random() < HUGE_SHARE:
        size = one.ByteSize() + 2 if isinstance(one, Message) else 2
        count = min(3_000_000 // size, 400_000)
    values.extend([one] * count)


def _value(field: Field, random_: random.Random) -> Any:
    is_huge = random_.random() < HUGE_SHARE
    match field.type:
        case Field.TYPE_STRING:
            return "x" * 3_000_000 if is_huge else random_.choice(STRINGS)
        case Field.TYPE_BYTES:
            return bytes(3_000_000) if is_huge else random_.randbytes(random_.choice((0, 1, 3, 4, 31, 32, 33, 256)))
        case Field.TYPE_BOOL:
            return random_.random() < 0.5
        case Field.TYPE_FLOAT | Field.TYPE_DOUBLE:
            return random_.choice(FLOATS)
        case Field.TYPE_ENUM:
            return random_.choice((0, 1, 2, 3, 4, 5, 6, 7, 99, -1, 2**31 - 1, -(2**31)))
        case Field.TYPE_UINT32 | Field.TYPE_INT32:
            return min(random_.choice(INTEGERS), 2**32 - 1 if field.type == Field.TYPE_UINT32 else 2**31 - 1)
        case _:
            return min(random_.choice(INTEGERS), 2**64 - 1 if field.type == Field.TYPE_UINT64 else 2**63 - 1)


def _truncated(data: bytes, random_: random.Random) -> bytes:
    return data[: random_.randrange(len(data) + 1)]


def _flipped(data: bytes, random_: random.Random) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(random_.choice((1, 1, 2, 8))):
        changed[random_.randrange(len(changed))] ^= 1 << random_.randrange(8)
    return bytes(changed)


def _spliced(data: bytes, random_: random.Random) -> bytes:
    cut = random_.randrange(len(data) + 1)
    return data[cut:] + data[:cut]


def _unknown_field(data: bytes, random_: random.Random) -> bytes:
    tags = (
        b"\xf8\x3f\x01",
        b"\xfa\x3f\x03abc",
        b"\xfd\x3f\0\0\0\0",
        b"\xfb\x3f\xfc\x3f",
        b"\x00",
        b"\x0b" * 200,
        b"\x07",
    )
    return data + random_.choice(tags)


def _garbage(data: bytes, random_: random.Random) -> bytes:
    return random_.randbytes(random_.choice((1, 5, 50, 500)))


def _nested(data: bytes, random_: random.Random) -> bytes:
    """Wrap the message in itself: deeper than a parser goes."""
    tag = random_.choice((b"\x0a", b"\x12", b"\x1a", b"\x32"))
    for _ in range(random_.choice((3, 150))):
        data = tag + _varint(len(data)) + data
    return data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
