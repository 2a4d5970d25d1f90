"""Exceptions of the clients. They mirror the errors of the services.

    PoiseClientError
    ├── InvalidRequestError     a field is wrong; `violations` names each             do not retry
    ├── UnauthenticatedError    the bearer token is missing or wrong                  do not retry
    ├── ForbiddenError          the token does not allow the call                     do not retry
    ├── NotFoundError           the named object does not exist                       do not retry
    ├── VersionMismatchError    the replica serves another policy version             correct, then retry
    ├── LabelsConsumedError     a label of the step reached the probe                 do not retry
    ├── TrainingStoppedError    the learner's last updates were not finite            an operator must act
    ├── ConflictError           same id with other content, or two writers            read again, then retry
    ├── QueueFullError          a bounded queue stayed full                           was retried
    ├── BusyError               the service stayed at its limit                       was retried
    ├── UnavailableError        draining, broken backend, or no answer                was retried
    ├── DeadlineExceededError   no answer within `timeout_s`                          raise the deadline
    ├── StepOrderError          calls of a run in the wrong order                     fix the loop
    └── InternalError           a bug: the service logs the traceback                 do not retry

A `retryable` error was retried until the deadline or the limit of the `RetryPolicy`. See `attempts` and
`elapsed_s`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class PoiseClientError(Exception):
    """Base of all exceptions of the clients."""

    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        retryable: bool = False,
        remedy: str = "",
        violations: Sequence[tuple[str, str]] = (),
        retry_after_s: float | None = None,
        call: str = "",
        starting: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        """Message of the service."""
        self.reason = reason or self.default_reason
        """Name of the `ErrorReason`, such as "QUEUE_FULL"."""
        self.retryable = retryable
        """Whether the same call may succeed later, unchanged."""
        self.remedy = remedy
        """The next thing to do, in one sentence; may be empty."""
        self.violations = tuple(violations)
        """The wrong fields: (path, what is wrong and what is allowed)."""
        self.retry_after_s = retry_after_s
        """Seconds to wait before the next attempt, if the service asked for a pause."""
        self.starting = starting
        """Whether the service is still starting. The message has the stage and its duration."""
        self.call = call
        """The call, such as "GenerationService.GetPolicy at host:port"."""
        self.attempts = 1
        """Number of attempts."""
        self.elapsed_s = 0.0
        """Seconds from the call to this error."""

    def __str__(self) -> str:
        parts = [f"{self.call}: {self.message}" if self.call else self.message]
        parts += [f"{field}: {what}" for field, what in self.violations if f"{field}: {what}" not in self.message]
        if self.remedy:
            parts.append(self.remedy)
        text = "; ".join(part.rstrip(".;") for part in parts)
        if self.attempts > 1:
            text += f" (gave up after {self.attempts} attempts over {self.elapsed_s:.1f} s)"
        return text


class InvalidRequestError(PoiseClientError):
    """At least one field is wrong: see `violations`."""

    default_reason = "INVALID_REQUEST"


class UnauthenticatedError(PoiseClientError):
    """The bearer token is missing or wrong."""

    default_reason = "UNAUTHENTICATED"


class ForbiddenError(PoiseClientError):
    """The token is valid but does not allow the call."""

    default_reason = "FORBIDDEN"


class NotFoundError(PoiseClientError):
    """The named object does not exist, or another service runs at the address."""

    default_reason = "NOT_FOUND"


class VersionMismatchError(PoiseClientError):
    """The replica serves another policy version or lineage than required."""

    default_reason = "VERSION_MISMATCH"


class LabelsConsumedError(PoiseClientError):
    """Labels of the step have reached the probe, so a baseline would leak them."""

    default_reason = "LABELS_CONSUMED"


class TrainingStoppedError(PoiseClientError):
    """The learner stopped training because its last updates were not finite. An operator must act."""

    default_reason = "TRAINING_STOPPED"


class ConflictError(PoiseClientError):
    """The same id has other content, or two callers write at once."""

    default_reason = "CONFLICT"


class QueueFullError(PoiseClientError):
    """A bounded queue stayed full."""

    default_reason = "QUEUE_FULL"


class BusyError(PoiseClientError):
    """The service stayed at its limit of concurrent work."""

    default_reason = "BUSY"


class UnavailableError(PoiseClientError):
    """The service drains (reason DRAINING), has no backend (BACKEND_DOWN) or does not respond (UNAVAILABLE)."""

    default_reason = "UNAVAILABLE"


class DeadlineExceededError(PoiseClientError):
    """The service did not answer before the deadline."""

    default_reason = "DEADLINE_EXCEEDED"


class StepOrderError(PoiseClientError):
    """The calls of a run came in the wrong order, or with groups of another step or run. Nothing was sent."""

    default_reason = "STEP_ORDER"


class InternalError(PoiseClientError):
    """A bug in the service, or a malformed answer."""

    default_reason = "INTERNAL"
