"""A page of a report: one file that needs nothing else, no network and no script, readable in light and dark.

Owns how a template is rendered, its style sheet and how numbers are written. Everything that is filled in is escaped.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any


def render_page(template: str, **values: Any) -> str:
    """Return a Jinja template filled in; `style` in it is the style sheet of all pages."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"decimal": decimal, "signed": signed, "duration": duration, "thousands": thousands}
    style = Markup(files(__package__).joinpath("style.css").read_text(encoding="utf-8"))  # noqa: S704  (our own)
    return environment.from_string(template).render(style=style, **values)


def decimal(value: float | None, places: int = 3) -> str:
    """Write a number with so many places."""
    return "–" if value is None else f"{value:.{places}f}".replace("-", "−")


def signed(value: float | None, places: int = 3) -> str:
    """Write a change with its sign."""
    return "–" if value is None else f"{value:+.{places}f}".replace("-", "−")


def thousands(value: float | None) -> str:
    """Write a count in groups of three digits."""
    return "–" if value is None else f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def duration(seconds: float | None) -> str:
    """Write a duration as people say it."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
