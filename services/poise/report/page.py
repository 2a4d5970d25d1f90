"""Renders report pages and formats numbers. All values in templates are escaped."""

from __future__ import annotations

from importlib.resources import files
from typing import Any


def render_page(template: str, **values: Any) -> str:
    """Render a Jinja template; its variable `style` is the common style sheet."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"decimal": decimal, "signed": signed, "duration": duration, "thousands": thousands}
    style = Markup(files(__package__).joinpath("style.css").read_text(encoding="utf-8"))  # noqa: S704  (our own)
    return environment.from_string(template).render(style=style, **values)


def decimal(value: float | None, places: int = 3) -> str:
    """Format a number with `places` decimal places."""
    return "–" if value is None else f"{value:.{places}f}".replace("-", "−")


def signed(value: float | None, places: int = 3) -> str:
    """Format a difference with its sign."""
    return "–" if value is None else f"{value:+.{places}f}".replace("-", "−")


def thousands(value: float | None) -> str:
    """Format a count in groups of three digits."""
    return "–" if value is None else f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def duration(seconds: float | None) -> str:
    """Format a duration, such as `12.5 s`, `34 min` or `2 h 5 min`."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
