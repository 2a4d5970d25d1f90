"""What a call may raise: one family, mirroring the services' own.

    PoiseClientError
    ├── InvalidRequestError     a field is wrong; `violations` names every one       do not retry
    ├── UnauthenticatedError    no bearer token, or a wrong one                       do not retry
    ├── ForbiddenError          a good token that may not do this                     do not retry
    ├── NotFoundError           the thing named does not exist                        do not retry
    ├── VersionMismatchError    another policy version is served than asked for       mend, then retry
    ├── LabelsConsumedError     the probe has learnt from this step already           do not retry
    ├── TrainingStoppedError    the learner's last updates were not finite            look, then go on
    ├── ConflictError           same id, other content; or two writers at once        re-read, then retry
    ├── QueueFullError          a bounded queue stayed full                           was retried
    ├── BusyError               the service stayed at its limit                       was retried
    ├── UnavailableError        draining, a broken backend, or nobody there           was retried
    ├── DeadlineExceededError   no answer within `timeout_s`                          was waited for
    └── InternalError           a defect: the service's log has the traceback         do not retry

What is `retryable` was retried for as long as the deadline and the `RetryPolicy` allowed: `attempts` and `elapsed_s`
say how often and how long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class PoiseClientError(Exception):
    """Base of the family."""

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
        """What the service said."""
        self.reason = reason or self.default_reason
        """Name of the `ErrorReason`, such as "QUEUE_FULL"."""
        self.retryable = retryable
        """Whether the same call may succeed later without the caller changing anything."""
        self.remedy = remedy
        """What to do about it, in a sentence; may be empty."""
        self.violations = tuple(violations)
        """The wrong fields: (path, what is wrong and what would be right)."""
        self.retry_after_s = retry_after_s
        """How long the service asked to wait before the next attempt."""
        self.starting = starting
        """Whether the service is still loading or recovering; the message says what it does, and for how long."""
        self.call = call
        """Which call of which service: "GenerationService.GetPolicy at host:port"."""
        self.attempts = 1
        """How often it was tried."""
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
    """A field is wrong: see `violations`."""

    default_reason = "INVALID_REQUEST"


class UnauthenticatedError(PoiseClientError):
    """No bearer token, or a wrong one."""

    default_reason = "UNAUTHENTICATED"


class ForbiddenError(PoiseClientError):
    """A good token that may not do this."""

    default_reason = "FORBIDDEN"


class NotFoundError(PoiseClientError):
    """The thing named does not exist, or the address serves something else."""

    default_reason = "NOT_FOUND"


class VersionMismatchError(PoiseClientError):
    """Another policy version, or lineage, is served than the one asked for."""

    default_reason = "VERSION_MISMATCH"


class LabelsConsumedError(PoiseClientError):
    """Labels of the step have reached the probe: a baseline now would leak them."""

    default_reason = "LABELS_CONSUMED"


class TrainingStoppedError(PoiseClientError):
    """The learner trains on nothing until someone has looked: its last updates in a row were not finite."""

    default_reason = "TRAINING_STOPPED"


class ConflictError(PoiseClientError):
    """The same id with other content, or two writers at once."""

    default_reason = "CONFLICT"


class QueueFullError(PoiseClientError):
    """A bounded queue stayed full."""

    default_reason = "QUEUE_FULL"


class BusyError(PoiseClientError):
    """The service stayed at its limit of concurrent work."""

    default_reason = "BUSY"


class UnavailableError(PoiseClientError):
    """The service is draining (reason DRAINING), lacks its backend (BACKEND_DOWN), or does not answer (UNAVAILABLE)."""

    default_reason = "UNAVAILABLE"


class DeadlineExceededError(PoiseClientError):
    """No answer within the call's time."""

    default_reason = "DEADLINE_EXCEEDED"


class InternalError(PoiseClientError):
    """A defect in the service, or an answer that makes no sense."""

    default_reason = "INTERNAL"
