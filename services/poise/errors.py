"""The one error family. Each class owns one gRPC status; the interceptor of `runtime` maps it to the wire.

    PoiseError
    ├── InvalidRequest      INVALID_ARGUMENT
    ├── Unauthenticated     UNAUTHENTICATED
    ├── Forbidden           PERMISSION_DENIED
    ├── NotFound            NOT_FOUND
    ├── VersionMismatch     FAILED_PRECONDITION
    ├── NotLoaded           FAILED_PRECONDITION
    ├── LabelsConsumed      FAILED_PRECONDITION
    ├── TrainingStopped     FAILED_PRECONDITION
    ├── Conflict            ABORTED
    ├── QueueFull           RESOURCE_EXHAUSTED, retry later
    ├── Busy                RESOURCE_EXHAUSTED, retry later
    ├── Draining            UNAVAILABLE, retry
    └── BackendDown         UNAVAILABLE, retry
        └── Unusable        not on the wire: the service exits

Knows neither gRPC nor any service: `status` is the name of a `grpc.StatusCode`, `reason` that of an
`ErrorReason` without its prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


class Misconfigured(Exception):
    """Mixed into errors that last until someone changes the settings: a program that one ends is not started again."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field."""

    field: str
    """Path within the request, such as `prompts[3].group_id`."""
    description: str
    """What is wrong and what would be right."""


class PoiseError(Exception):
    """Base of the family. Raised directly it would be a defect: raise a subclass."""

    status: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, remedy: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.retry_after_s = retry_after_s


class InvalidRequest(PoiseError):
    """A field is wrong. Carries every violation found, not only the first."""

    status, reason = "INVALID_ARGUMENT", "INVALID_REQUEST"

    def __init__(self, violations: Sequence[FieldViolation], *, remedy: str = "") -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations), remedy=remedy)
        self.violations = tuple(violations)

    @classmethod
    def field(cls, field: str, description: str, *, remedy: str = "") -> InvalidRequest:
        """Build the error for a single field."""
        return cls([FieldViolation(field, description)], remedy=remedy)


class Unauthenticated(PoiseError):
    """No bearer token, or a wrong one."""

    status, reason = "UNAUTHENTICATED", "UNAUTHENTICATED"


class Forbidden(PoiseError):
    """A good token that may not do this."""

    status, reason = "PERMISSION_DENIED", "FORBIDDEN"


class NotFound(PoiseError):
    """The thing named does not exist."""

    status, reason = "NOT_FOUND", "NOT_FOUND"


class VersionMismatch(PoiseError):
    """The caller needs another policy version, or lineage, than the one served."""

    status, reason = "FAILED_PRECONDITION", "VERSION_MISMATCH"


class NotLoaded(PoiseError):
    """The service holds no model or weights yet."""

    status, reason = "FAILED_PRECONDITION", "NOT_LOADED"


class LabelsConsumed(PoiseError):
    """Labels of the step have reached the probe: a baseline now would leak them."""

    status, reason = "FAILED_PRECONDITION", "LABELS_CONSUMED"


class TrainingStopped(PoiseError):
    """Nothing is trained on until someone has looked: the last updates in a row were not finite."""

    status, reason = "FAILED_PRECONDITION", "TRAINING_STOPPED"


class Conflict(PoiseError):
    """The same id with other content, or two writers at once."""

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
    """Something the service stands on does not answer."""

    status, reason, retryable = "UNAVAILABLE", "BACKEND_DOWN", True


class Unusable(BackendDown, Misconfigured):
    """The model, or a setting that does not fit it, cannot be used."""
