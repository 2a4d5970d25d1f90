"""Settings of verifier processes."""

from __future__ import annotations

from pydantic import Field

from poise.runtime.config.settings import StrictModel


class VerifierConfig(StrictModel):
    """Verifier processes and their limits."""

    timeout_s: float = Field(5.0, gt=0, le=3600)
    """Time limit for one response, s. A verifier that exceeds it is killed; the reward is 0."""
    num_workers: int = Field(2, ge=1, le=256)
    """Number of verifier processes."""
    max_memory_bytes: int = Field(1024 * 1024 * 1024, ge=128 * 1024 * 1024)
    """Memory limit of a verifier process, bytes. If a check exceeds it, the reward is 0 and the process is replaced."""
    max_response_chars: int = Field(262_144, ge=1)
    """Maximum length of a response to verify, in characters. Longer responses get reward 0."""
