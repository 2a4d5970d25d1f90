"""The trace context of calls. Set `TRACEPARENT` to send it with every call as W3C `traceparent`."""

from __future__ import annotations

from contextvars import ContextVar

TRACEPARENT: ContextVar[str] = ContextVar("poise_traceparent", default="")
"""`00-<32 hex digits of the trace>-<16 of the span>-01`. Empty sends none."""
TRACEPARENT_KEY = "traceparent"
"""Its key in gRPC metadata."""
