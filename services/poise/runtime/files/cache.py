"""Where what can be made again is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_ENV = "POISE_CACHE"


def cache_dir() -> Path:
    """Return the folder: $POISE_CACHE, or poise under $XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get(CACHE_ENV):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "poise"
