"""The trace that calls belong to: whoever sets it here has it sent along with every call, as W3C `traceparent`.

Knows no tracing library: a loop of one's own sets what its library says.
"""

from __future__ import annotations

from contextvars import ContextVar

TRACEPARENT: ContextVar[str] = ContextVar("poise_traceparent", default="")
"""Such as `00-<32 hex digits of the trace>-<16 of the span>-01`; empty sends none."""
TRACEPARENT_KEY = "traceparent"
"""Its name in gRPC's metadata."""
