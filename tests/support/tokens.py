"""Files with bearer tokens, as users make them."""

from __future__ import annotations

from pathlib import Path


def write_token(path: Path, token: str) -> Path:
    """Write a token that only this user can read."""
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text(f"{token}\n")
    return path
