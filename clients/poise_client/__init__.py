"""The SDK of POISE served."""

from poise_client._weights import weights_digest

__all__ = ["weights_digest"]
