import grpc
import pytest
from google.rpc import error_details_pb2

from poise import errors
from poise.errors import FieldViolation, InvalidRequest, PoiseError
from poise.runtime.admin.app import _HTTP_STATUS
from poise.runtime.rpc.interceptors import rich_status
from poise_proto.v1 import errors_pb2

FAMILY = PoiseError.__subclasses__()

# The table of the proto's comments: what each error is on the wire.
WIRE = {
    "InvalidRequest": ("INVALID_ARGUMENT", "INVALID_REQUEST", False),
    "Unauthenticated": ("UNAUTHENTICATED", "UNAUTHENTICATED", False),
    "Forbidden": ("PERMISSION_DENIED", "FORBIDDEN", False),
    "NotFound": ("NOT_FOUND", "NOT_FOUND", False),
    "VersionMismatch": ("FAILED_PRECONDITION", "VERSION_MISMATCH", False),
    "LabelsConsumed": ("FAILED_PRECONDITION", "LABELS_CONSUMED", False),
    "TrainingStopped": ("FAILED_PRECONDITION", "TRAINING_STOPPED", False),
    "Conflict": ("ABORTED", "CONFLICT", False),
    "QueueFull": ("RESOURCE_EXHAUSTED", "QUEUE_FULL", True),
    "Busy": ("RESOURCE_EXHAUSTED", "BUSY", True),
    "Draining": ("UNAVAILABLE", "DRAINING", True),
    "BackendDown": ("UNAVAILABLE", "BACKEND_DOWN", True),
    "PoiseError": ("INTERNAL", "INTERNAL", False),
}


def make(cls, **options):
    return InvalidRequest.field("a.b", "is wrong") if cls is InvalidRequest else cls("it broke", **options)


def unpacked(status):
    kinds = (errors_pb2.PoiseErrorDetail, error_details_pb2.BadRequest, error_details_pb2.RetryInfo)
    return [kind.FromString(d.value) for d in status.details for kind in kinds if d.Is(kind.DESCRIPTOR)]


@pytest.mark.parametrize("cls", [*FAMILY, PoiseError])
def test_error_becomes_a_status_with_reason_and_retryability(cls):
    status = rich_status(make(cls))
    code, reason, retryable = WIRE[cls.__name__]
    assert status.code == grpc.StatusCode[code].value[0]
    detail = unpacked(status)[0]
    assert errors_pb2.ErrorReason.Name(detail.reason) == f"ERROR_REASON_{reason}"
    assert detail.retryable is retryable
    assert cls.__name__ in errors.__doc__


def test_every_reason_of_the_proto_has_an_error():
    reasons = {f"ERROR_REASON_{cls.reason}" for cls in (*FAMILY, PoiseError)}
    assert reasons == set(errors_pb2.ErrorReason.keys()) - {"ERROR_REASON_UNSPECIFIED"}


def test_every_status_has_an_http_status():
    assert {cls.status for cls in FAMILY} == _HTTP_STATUS.keys()


def test_status_contains_all_violations_and_the_remedy():
    error = InvalidRequest([FieldViolation("a", "is 1"), FieldViolation("b[2].c", "is empty")], remedy="Mend them.")
    status = rich_status(error)
    detail, bad_request = unpacked(status)
    assert status.message == "a: is 1; b[2].c: is empty"
    assert detail.remedy == "Mend them."
    assert [(v.field, v.description) for v in bad_request.field_violations] == [("a", "is 1"), ("b[2].c", "is empty")]


def test_status_contains_the_retry_delay():
    assert len(rich_status(make(errors.Busy)).details) == 1
    [_, retry] = unpacked(rich_status(make(errors.Busy, retry_after_s=1.25)))
    assert retry.retry_delay.ToMilliseconds() == 1250


@pytest.mark.parametrize("letter", ["x", "é", "长", "\U0001f98a", "\n", "\0"])
def test_status_fits_into_the_headers_of_a_client(letter):
    violations = [FieldViolation(letter * 300, letter * 300)] * 200
    error = InvalidRequest(violations, remedy=letter * 3000)
    error.retry_after_s = 3.0
    status = rich_status(error)
    message = status.message.encode()
    escaped = sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in message)
    assert escaped + len(status.SerializeToString()) * 4 / 3 < 7600  # of 8192, which hold the call's own headers too
    assert "more wrong fields" in unpacked(status)[1].field_violations[-1].description


def test_text_beyond_utf8_is_replaced():
    assert rich_status(errors.NotFound("a\udc80b")).message == "a?b"


def test_single_long_violation_is_shortened():
    [_, bad_request] = unpacked(rich_status(InvalidRequest.field("f" * 9000, "d" * 9000)))
    [violation] = bad_request.field_violations
    assert violation.field.endswith("…")
    assert len(violation.field.encode()) <= 400
