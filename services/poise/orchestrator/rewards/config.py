"""The settings of verification."""

from __future__ import annotations

from pydantic import Field

from poise.runtime.config.settings import StrictModel


class VerifierConfig(StrictModel):
    """Where and for how long answers are checked."""

    timeout_s: float = Field(5.0, gt=0, le=3600)
    """Longest check of one response, s. Beyond it the verifier is killed and the response earns 0."""
    num_workers: int = Field(2, ge=1, le=256)
    """Processes that check, at once."""
    max_memory_bytes: int = Field(1024 * 1024 * 1024, ge=128 * 1024 * 1024)
    """Memory that one process may allocate, bytes. A check that needs more earns 0, and its process is replaced."""
    max_response_chars: int = Field(262_144, ge=1)
    """A longer response earns 0 unchecked."""
