"""The error family of the services. Each class has one gRPC status, which `runtime.rpc.interceptors` sends.

    PoiseError
    ├── InvalidRequest      INVALID_ARGUMENT
    ├── Unauthenticated     UNAUTHENTICATED
    ├── Forbidden           PERMISSION_DENIED
    ├── NotFound            NOT_FOUND
    ├── VersionMismatch     FAILED_PRECONDITION
    ├── LabelsConsumed      FAILED_PRECONDITION
    ├── TrainingStopped     FAILED_PRECONDITION
    ├── Conflict            ABORTED
    ├── QueueFull           RESOURCE_EXHAUSTED, retryable
    ├── Busy                RESOURCE_EXHAUSTED, retryable
    ├── Draining            UNAVAILABLE, retryable
    └── BackendDown         UNAVAILABLE, retryable
        ├── Starting        the same; the service is loading or recovering
        └── Unusable        never sent; the service exits

`status` is the name of a `grpc.StatusCode`, `reason` that of an `ErrorReason` without its prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


class Misconfigured(Exception):
    """Mixin for errors that persist until the settings change. A program that exits with one is not restarted."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field."""

    field: str
    """Path within the request, such as `prompts[3].group_id`."""
    description: str
    """What is wrong and what is allowed."""


class PoiseError(Exception):
    """Base of the family. Raise a subclass; the base itself reports a bug."""

    status: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False
    starting: ClassVar[bool] = False
    """Whether the service is starting; the message is then its progress."""

    def __init__(self, message: str, *, remedy: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.retry_after_s = retry_after_s


class InvalidRequest(PoiseError):
    """At least one field is wrong. Contains every violation found, not only the first."""

    status, reason = "INVALID_ARGUMENT", "INVALID_REQUEST"

    def __init__(self, violations: Sequence[FieldViolation], *, remedy: str = "") -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations), remedy=remedy)
        self.violations = tuple(violations)

    @classmethod
    def field(cls, field: str, description: str, *, remedy: str = "") -> InvalidRequest:
        """Return the error for a single field."""
        return cls([FieldViolation(field, description)], remedy=remedy)


class Unauthenticated(PoiseError):
    """The bearer token is missing or wrong."""

    status, reason = "UNAUTHENTICATED", "UNAUTHENTICATED"


class Forbidden(PoiseError):
    """The caller is known but may not do this."""

    status, reason = "PERMISSION_DENIED", "FORBIDDEN"


class NotFound(PoiseError):
    """The named object does not exist."""

    status, reason = "NOT_FOUND", "NOT_FOUND"


class VersionMismatch(PoiseError):
    """The caller needs another policy version, or lineage, than the one served."""

    status, reason = "FAILED_PRECONDITION", "VERSION_MISMATCH"


class LabelsConsumed(PoiseError):
    """Labels of the step have reached the probe, so a baseline would leak them."""

    status, reason = "FAILED_PRECONDITION", "LABELS_CONSUMED"


class TrainingStopped(PoiseError):
    """Too many updates in a row were not finite. The learner trains again after a restart with other settings."""

    status, reason = "FAILED_PRECONDITION", "TRAINING_STOPPED"


class Conflict(PoiseError):
    """An id was sent again with other content, or two callers write at once."""

    status, reason = "ABORTED", "CONFLICT"


class QueueFull(PoiseError):
    """A bounded queue is full."""

    status, reason, retryable = "RESOURCE_EXHAUSTED", "QUEUE_FULL", True


class Busy(PoiseError):
    """The service is at its limit of concurrent work."""

    status, reason, retryable = "RESOURCE_EXHAUSTED", "BUSY", True


class Draining(PoiseError):
    """The service is shutting down or paused."""

    status, reason, retryable = "UNAVAILABLE", "DRAINING", True


class BackendDown(PoiseError):
    """A backend of the service, such as Redis or the engine, does not respond."""

    status, reason, retryable = "UNAVAILABLE", "BACKEND_DOWN", True


class Starting(BackendDown):
    """The service is loading or recovering. The message is the stage and its duration."""

    starting = True


class Unusable(BackendDown, Misconfigured):
    """The model cannot be used, or a setting does not fit it."""
