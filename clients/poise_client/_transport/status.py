"""Converts a failed RPC to an exception, by its `PoiseErrorDetail` or else by its gRPC status."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from poise_client import errors
from poise_client.errors import PoiseClientError
from poise_proto.v1 import errors_pb2

_BY_REASON: dict[int, type[PoiseClientError]] = {
    errors_pb2.ERROR_REASON_INVALID_REQUEST: errors.InvalidRequestError,
    errors_pb2.ERROR_REASON_UNAUTHENTICATED: errors.UnauthenticatedError,
    errors_pb2.ERROR_REASON_FORBIDDEN: errors.ForbiddenError,
    errors_pb2.ERROR_REASON_NOT_FOUND: errors.NotFoundError,
    errors_pb2.ERROR_REASON_VERSION_MISMATCH: errors.VersionMismatchError,
    errors_pb2.ERROR_REASON_LABELS_CONSUMED: errors.LabelsConsumedError,
    errors_pb2.ERROR_REASON_TRAINING_STOPPED: errors.TrainingStoppedError,
    errors_pb2.ERROR_REASON_CONFLICT: errors.ConflictError,
    errors_pb2.ERROR_REASON_QUEUE_FULL: errors.QueueFullError,
    errors_pb2.ERROR_REASON_BUSY: errors.BusyError,
    errors_pb2.ERROR_REASON_DRAINING: errors.UnavailableError,
    errors_pb2.ERROR_REASON_BACKEND_DOWN: errors.UnavailableError,
    errors_pb2.ERROR_REASON_INTERNAL: errors.InternalError,
}

_BY_CODE: dict[grpc.StatusCode, type[PoiseClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidRequestError,
    grpc.StatusCode.UNAUTHENTICATED: errors.UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: errors.ForbiddenError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.UNIMPLEMENTED: errors.NotFoundError,
    grpc.StatusCode.ABORTED: errors.ConflictError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.BusyError,
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
    grpc.StatusCode.CANCELLED: errors.UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
}
"""For peers without details: proxies, gRPC itself, other servers."""

_RETRYABLE_CODES = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED}
)

_REMEDIES: dict[grpc.StatusCode, str] = {
    grpc.StatusCode.UNAVAILABLE: "check the address, that the service runs, and that both ends agree on TLS",
    grpc.StatusCode.UNIMPLEMENTED: "check that the address is this service's gRPC port and not another's",
    grpc.StatusCode.UNAUTHENTICATED: "pass the service's token as token=...",
    grpc.StatusCode.DEADLINE_EXCEEDED: "pass a longer timeout_s, or check the service's log",
}


_CORE_ERROR = "Internal error from Core"
"""gRPC's message when it sends on a call that has just ended."""


def error_from_rpc(error: grpc.aio.AioRpcError, call: str) -> PoiseClientError:
    """Return the exception for a failed RPC. `call` is the name of the RPC, for its text."""
    code = error.code()
    message = error.details() or f"failed with {code.name}"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:
        return errors.InvalidRequestError(message, remedy="send less at once", call=call)
    if code is grpc.StatusCode.INTERNAL and message.startswith(_CORE_ERROR):
        return errors.UnavailableError(
            "the service ended the call while the request was sent, and gRPC lost its answer", retryable=True, call=call
        )
    kind = _BY_CODE.get(code, errors.InternalError)
    reason, retryable, remedy = "", code in _RETRYABLE_CODES, _REMEDIES.get(code, "")
    violations: list[tuple[str, str]] = []
    retry_after_s: float | None = None

    detail, bad_request, retry_info = (
        errors_pb2.PoiseErrorDetail(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    for packed in _details(error):
        if packed.Unpack(detail):
            kind = _BY_REASON.get(detail.reason, kind)
            if detail.reason in _BY_REASON:
                reason = errors_pb2.ErrorReason.Name(detail.reason).removeprefix("ERROR_REASON_")
            retryable, remedy = detail.retryable, detail.remedy
        elif packed.Unpack(bad_request):
            violations = [(wrong.field, wrong.description) for wrong in bad_request.field_violations]
        elif packed.Unpack(retry_info):
            retry_after_s = retry_info.retry_delay.ToTimedelta().total_seconds()
    return kind(
        message,
        reason=reason,
        retryable=retryable,
        remedy=remedy,
        violations=violations,
        retry_after_s=retry_after_s,
        call=call,
        starting=detail.starting,
    )


def _details(error: grpc.aio.AioRpcError) -> Sequence[Any]:
    """Return the packed details of the rich status; none if it is absent, malformed or has another code."""
    trailing = cast(Sequence[tuple[str, str | bytes]], error.trailing_metadata() or ())  # the stubs lack the tuple
    for key, value in trailing:
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            try:
                status = status_pb2.Status.FromString(value)
            except DecodeError:
                return ()
            return status.details if status.code == error.code().value[0] else ()
    return ()


def renumber(error: PoiseClientError, field: str, indices: Sequence[int]) -> None:
    """Replace a request's indices in an error with the caller's: `field[k]` becomes `field[indices[k]]`."""
    prefix = f"{field}["

    def renamed(path: str) -> str:
        number, bracket, rest = path.removeprefix(prefix).partition("]")
        if not path.startswith(prefix) or not bracket or not number.isdigit() or int(number) >= len(indices):
            return path
        return f"{prefix}{indices[int(number)]}]{rest}"

    violations = tuple((renamed(path), what) for path, what in error.violations)
    for (old, what), (new, _) in zip(error.violations, violations, strict=True):
        error.message = error.message.replace(f"{old}: {what}", f"{new}: {what}")
    error.violations = violations
