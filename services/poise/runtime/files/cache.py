"""The cache folder, for files that can be created again."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_ENV = "POISE_CACHE"


def cache_dir() -> Path:
    """Return $POISE_CACHE, or the folder poise in $XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get(CACHE_ENV):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "poise"
