"""Common units of measurement, by name and symbol."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from poise.orchestrator.rewards.numbers.arithmetic import CONTEXT


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of measurement."""

    dimension: tuple[tuple[str, int], ...] = ()
    """Powers of the base quantities; empty for an unknown unit."""
    factor: Any = Fraction(1)
    """Its size in the base unit of its dimension."""
    is_factor: bool = False
    """Whether it only scales a number, like percent and degree."""

    def is_like(self, other: Unit) -> bool:
        """Return whether both measure the same quantity."""
        return bool(self.dimension) and self.dimension == other.dimension

    def is_part_of(self, other: Unit) -> bool:
        """Return whether it is a smaller unit of the same quantity, like minutes of hours."""
        return self.is_like(other) and not self.is_factor and bool(self.factor < other.factor)


PERCENT = Unit((("share", 1),), Fraction(1, 100), is_factor=True)
PERMILLE = Unit((("share", 1),), Fraction(1, 1000), is_factor=True)
DEGREE = Unit((("angle", 1),), CONTEXT.pi / 180, is_factor=True)
RADIAN = Unit((("angle", 1),), Fraction(1), is_factor=True)
OTHER = Unit()
"""An unknown unit, such as `apples`."""

_NAMES: dict[str, dict[str, str | int]] = {
    # base quantity: names and symbols, size in the base unit
    "length": {
        "m meter meters metre metres": 1,
        "km kilometer kilometers kilometre kilometres": 1000,
        "cm centimeter centimeters centimetre centimetres": "1/100",
        "mm millimeter millimeters millimetre millimetres": "1/1000",
        "μm um micrometer micrometers micrometre micrometres microns": "1/1000000",
        "nm nanometer nanometers nanometre nanometres": "1/1000000000",
        "inch inches": "254/10000",
        "ft foot feet": "3048/10000",
        "yd yard yards": "9144/10000",
        "mi mile miles": "1609344/1000",
    },
    "mass": {
        "kg kilogram kilograms": 1,
        "g gram grams": "1/1000",
        "mg milligram milligrams": "1/1000000",
        "tonne tonnes": 1000,
        "lb lbs pound pounds": "45359237/100000000",
        "oz ounce ounces": "45359237/1600000000",
    },
    "time": {
        "s sec secs second seconds": 1,
        "ms millisecond milliseconds": "1/1000",
        "min mins minute minutes": 60,
        "h hr hrs hour hours": 3600,
        "day days": 86400,
        "week weeks": 604800,
    },
    "month": {"month months": 1, "year years yr yrs": 12},
    "volume": {
        "l L liter liters litre litres": "1/1000",
        "ml mL milliliter milliliters millilitre millilitres": "1/1000000",
        "gallon gallons": "3785411784/1000000000000",
    },
    "dollar": {"＄ dollar dollars USD usd": 1, "¢ cent cents": "1/100"},
    "euro": {"€ euro euros EUR": 1},
    "sterling": {"£ GBP": 1, "pence": "1/100"},
    "yen": {"¥ yen JPY": 1},
    "rupee": {"₹ rupee rupees INR": 1},
    "temperature": {"°C Celsius celsius": 1},
    "fahrenheit": {"°F Fahrenheit fahrenheit": 1},
    "force": {"N newton newtons": 1},
    "energy": {"J joule joules": 1, "kJ kilojoule kilojoules": 1000},
    "watt": {"W watt watts": 1, "kW kilowatt kilowatts": 1000},
    "hertz": {"Hz hertz": 1, "kHz": 1000, "MHz": 1000000},
    "volt": {"V volt volts": 1},
}
_BASE = {"volume": (("length", 3),)}
"""Quantities derived from other quantities."""
CURRENCIES = "＄€£¥₹"


def _table() -> dict[str, Unit]:
    units = {
        name: Unit(_BASE.get(quantity, ((quantity, 1),)), Fraction(size))
        for quantity, sizes in _NAMES.items()
        for names, size in sizes.items()
        for name in names.split()
    }
    units |= dict.fromkeys(("%", "percent", "percents", "percentage", "pct"), PERCENT)
    kmh = Unit((("length", 1), ("time", -1)), Fraction(1000, 3600))
    units |= {"kmh": kmh, "kph": kmh, "mph": Unit(kmh.dimension, Fraction(1609344, 3600000))}
    units |= {"‰": PERMILLE, "permille": PERMILLE}
    units |= dict.fromkeys(("°", "deg", "degree", "degrees"), DEGREE)
    units |= dict.fromkeys(("rad", "radian", "radians"), RADIAN)
    return units


UNITS = _table()

_NAME = r"(?:°[CF](?![A-Za-z])|[%‰°¢＄€£¥₹]|[A-Za-zμ]+)"
_POWER = r"\s*\^\s*[({]?\s*(?P<power>-?[1-9])(?!\d)\s*[)}]?"
_PART = re.compile(rf"\s*(?P<per>per\s+|/\s*)?(?:(?P<word>square|cubic|sq)\s+)?(?P<name>{_NAME})(?:{_POWER})?")
_POWER_WORDS = {"square": 2, "sq": 2, "cubic": 3}
_MAX_PARTS = 4
_INCH = re.compile(r"\s*(?:[.,;:!)\]}]|$)")
"""Text after `in` where it is the unit, not the preposition."""


@lru_cache(maxsize=1024)
def read_unit(text: str) -> tuple[Unit, int] | None:
    """Return the unit at the start of `text`, such as `km/h`, and its length; None if there is no known unit."""
    powers: dict[str, int] = {}
    factor: Any = Fraction(1)
    end = 0
    for _ in range(_MAX_PARTS):
        part = _PART.match(text, end)
        unit = part and UNITS.get(part["name"])
        if part and part["name"] == "in" and _INCH.match(text, part.end()):
            unit = UNITS["inch"]
        if not part or not unit or bool(part["per"]) != bool(end) or (end and unit.is_factor):
            break
        if unit.is_factor:
            return unit, part.end("name")
        power = int(part["power"] or 1) * _POWER_WORDS.get(part["word"], 1) * (-1 if part["per"] else 1)
        for quantity, own in unit.dimension:
            powers[quantity] = powers.get(quantity, 0) + own * power
        factor *= unit.factor**power
        end = part.end()
    if not end:
        return None
    dimension = tuple(sorted((quantity, power) for quantity, power in powers.items() if power))
    return Unit(dimension, factor), end
