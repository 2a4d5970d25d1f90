"""Channels, tokens, deadlines, retries and event loops of the clients. Users import from `poise_client` instead."""

from poise_client._transport import fork  # noqa: F401 (first: it loads gRPC)

# isort: split
from poise_client._transport.channel import KEEPALIVE_OPTIONS
from poise_client._transport.token import check_token
from poise_client._transport.tracing import TRACEPARENT_KEY

__all__ = ["KEEPALIVE_OPTIONS", "TRACEPARENT_KEY", "check_token"]
