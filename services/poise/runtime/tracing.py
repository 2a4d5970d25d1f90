"""OpenTelemetry tracing across services, one trace for each step, with the same ids in the logs.

The trace id of a step is a hash of run and step: every process that works on the step, also after a restart, adds to
one trace. Without an endpoint nothing is recorded, but the logs still have the ids.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from poise.runtime.config.settings import TracingConfig
from poise.runtime.logging import log_ids
from poise_client import TRACEPARENT
from poise_client._transport import TRACEPARENT_KEY

_STEP_TRACE: ContextVar[int] = ContextVar("poise_step_trace", default=0)
"""Id of new traces; 0 means random."""
_PROPAGATOR = TraceContextTextMapPropagator()


def configure_tracing(config: TracingConfig, service: str) -> None:
    """Start recording if `otlp_endpoint` is set. Call it once per process."""
    if not config.otlp_endpoint:
        return
    import requests
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class StepIds(RandomIdGenerator):
        """Random ids, except for the traces of steps."""

        def generate_trace_id(self) -> int:
            return _STEP_TRACE.get() or super().generate_trace_id()

    provider = TracerProvider(resource=Resource.create({"service.name": f"poise-{service}"}), id_generator=StepIds())
    endpoint = f"{config.otlp_endpoint.rstrip('/')}/v1/traces"
    session = requests.Session()
    session.trust_env = config.use_proxy
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, session=session)))
    trace.set_tracer_provider(provider)


@contextmanager
def step_span(name: str, run_id: str, step: int) -> Iterator[None]:
    """Record a span of a step's trace. Calls inside the block become its children."""
    trace_id = int.from_bytes(hashlib.sha256(f"{run_id}/{step}".encode()).digest()[:16], "big") or 1
    with ExitStack() as stack:
        step_token = _STEP_TRACE.set(trace_id)
        stack.callback(_STEP_TRACE.reset, step_token)
        span = stack.enter_context(_tracer().start_as_current_span(name, attributes={"run_id": run_id, "step": step}))
        context = span.get_span_context()
        if not context.is_valid:  # nothing is recorded, but the logs need an id
            context = SpanContext(trace_id, secrets.randbits(63) + 1, is_remote=False, trace_flags=TraceFlags(0))
            stack.enter_context(trace.use_span(NonRecordingSpan(context)))
        headers: dict[str, str] = {}
        _PROPAGATOR.inject(headers)
        parent_token = TRACEPARENT.set(headers.get(TRACEPARENT_KEY, ""))
        stack.callback(TRACEPARENT.reset, parent_token)
        stack.enter_context(log_ids(trace_id=trace.format_trace_id(context.trace_id), step=step))
        yield


@contextmanager
def call_span(method: str, metadata: Sequence[tuple[str, Any]]) -> Iterator[None]:
    """Record a server span. Its parent is the caller's span if the metadata contain a traceparent."""
    traceparent = next((value for key, value in metadata if key == TRACEPARENT_KEY), None)
    if not isinstance(traceparent, str):
        with _tracer().start_as_current_span(method, kind=SpanKind.SERVER):
            yield
        return
    parent = _PROPAGATOR.extract({TRACEPARENT_KEY: traceparent})
    context = trace.get_current_span(parent).get_span_context()
    if not context.is_valid:  # a malformed header
        yield
        return
    ids = log_ids(trace_id=trace.format_trace_id(context.trace_id))
    with _tracer().start_as_current_span(method, context=parent, kind=SpanKind.SERVER), ids:
        yield


def _tracer() -> trace.Tracer:
    return trace.get_tracer("poise")
