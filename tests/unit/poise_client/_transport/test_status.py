import grpc
import pytest
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from poise_client import errors
from poise_client._transport.status import error_from_rpc, renumber
from poise_proto.v1 import errors_pb2

CALL = "ValueService.PublishLabels at host:1"


def packed(*details):
    anys = []
    for detail in details:
        anys.append(Any())
        anys[-1].Pack(detail)
    return anys


def rpc_error(code, message="it broke", details=(), status_code=None):
    status = status_pb2.Status(code=status_code or code.value[0], message=message, details=packed(*details))
    trailing = grpc.aio.Metadata(("grpc-status-details-bin", status.SerializeToString()))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, message)


def bare_error(code, message="it broke"):
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), message)


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("INVALID_REQUEST", errors.InvalidRequestError),
        ("UNAUTHENTICATED", errors.UnauthenticatedError),
        ("FORBIDDEN", errors.ForbiddenError),
        ("NOT_FOUND", errors.NotFoundError),
        ("VERSION_MISMATCH", errors.VersionMismatchError),
        ("LABELS_CONSUMED", errors.LabelsConsumedError),
        ("TRAINING_STOPPED", errors.TrainingStoppedError),
        ("CONFLICT", errors.ConflictError),
        ("QUEUE_FULL", errors.QueueFullError),
        ("BUSY", errors.BusyError),
        ("DRAINING", errors.UnavailableError),
        ("BACKEND_DOWN", errors.UnavailableError),
        ("INTERNAL", errors.InternalError),
    ],
)
def test_the_reason_determines_the_class(reason, kind):
    detail = errors_pb2.PoiseErrorDetail(reason=f"ERROR_REASON_{reason}", retryable=True, remedy="do this")
    error = error_from_rpc(rpc_error(grpc.StatusCode.UNKNOWN, details=[detail]), CALL)
    assert type(error) is kind
    assert (error.reason, error.retryable, error.remedy, error.call) == (reason, True, "do this", CALL)


def test_every_reason_has_a_class():
    for name, number in errors_pb2.ErrorReason.items():
        detail = errors_pb2.PoiseErrorDetail(reason=number)
        error = error_from_rpc(rpc_error(grpc.StatusCode.UNKNOWN, details=[detail]), CALL)
        if number:
            assert error.reason == name.removeprefix("ERROR_REASON_")


def test_the_service_decides_if_a_retry_may_help():
    detail = errors_pb2.PoiseErrorDetail(reason="ERROR_REASON_BACKEND_DOWN", retryable=False)
    assert not error_from_rpc(rpc_error(grpc.StatusCode.UNAVAILABLE, details=[detail]), CALL).retryable


def test_violations_and_retry_delay_are_read():
    wrong = error_details_pb2.BadRequest()
    wrong.field_violations.add(field="groups[0].domain", description="is empty; required: a name")
    wait = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000))
    error = error_from_rpc(rpc_error(grpc.StatusCode.INVALID_ARGUMENT, details=[wait, wrong]), CALL)
    assert isinstance(error, errors.InvalidRequestError)
    assert error.violations == (("groups[0].domain", "is empty; required: a name"),)
    assert error.retry_after_s == 1.5
    assert "groups[0].domain: is empty; required: a name" in str(error)


@pytest.mark.parametrize(
    ("code", "kind", "retryable"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequestError, False),
        (grpc.StatusCode.UNAUTHENTICATED, errors.UnauthenticatedError, False),
        (grpc.StatusCode.PERMISSION_DENIED, errors.ForbiddenError, False),
        (grpc.StatusCode.NOT_FOUND, errors.NotFoundError, False),
        (grpc.StatusCode.UNIMPLEMENTED, errors.NotFoundError, False),
        (grpc.StatusCode.ABORTED, errors.ConflictError, False),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.BusyError, True),
        (grpc.StatusCode.UNAVAILABLE, errors.UnavailableError, True),
        (grpc.StatusCode.CANCELLED, errors.UnavailableError, True),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceededError, False),
        (grpc.StatusCode.INTERNAL, errors.InternalError, False),
        (grpc.StatusCode.UNKNOWN, errors.InternalError, False),
    ],
)
def test_errors_without_details_are_mapped_by_code(code, kind, retryable):
    error = error_from_rpc(bare_error(code), CALL)
    assert type(error) is kind
    assert error.retryable is retryable


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(
            grpc.aio.AioRpcError(
                grpc.StatusCode.UNAVAILABLE,
                grpc.aio.Metadata(),
                grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff not a status")),
                "it broke",
            ),
            id="malformed",
        ),
        pytest.param(
            rpc_error(
                grpc.StatusCode.UNAVAILABLE,
                details=[errors_pb2.PoiseErrorDetail(reason="ERROR_REASON_FORBIDDEN")],
                status_code=grpc.StatusCode.PERMISSION_DENIED.value[0],
            ),
            id="of another code",
        ),
    ],
)
def test_malformed_details_are_ignored(error):
    translated = error_from_rpc(error, CALL)
    assert type(translated) is errors.UnavailableError
    assert translated.retryable


def test_a_message_above_the_limit_is_an_invalid_request():
    text = "Received message larger than max (5000000 vs. 4194304)"
    error = error_from_rpc(bare_error(grpc.StatusCode.RESOURCE_EXHAUSTED, text), CALL)
    assert type(error) is errors.InvalidRequestError
    assert not error.retryable


def test_an_error_reads_as_a_sentence():
    error = errors.QueueFullError("the queue is full.", remedy="wait.", call=CALL)
    error.attempts, error.elapsed_s = 3, 2.04
    assert str(error) == f"{CALL}: the queue is full; wait (gave up after 3 attempts over 2.0 s)"


def test_every_class_has_the_base_and_a_reason():
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.PoiseClientError):
            assert kind("x").reason == kind.default_reason


def test_fields_are_renumbered_for_the_caller():
    error = errors.InvalidRequestError(
        "groups[1].domain: is empty",
        violations=[("groups[1].domain", "is empty"), ("run_id", "is empty"), ("groups[9].domain", "is out of range")],
    )
    renumber(error, "groups", [10, 11])
    assert [field for field, _ in error.violations] == ["groups[11].domain", "run_id", "groups[9].domain"]
    assert error.message == "groups[11].domain: is empty"


def test_a_send_error_after_the_answer_is_retryable():
    error = error_from_rpc(bare_error(grpc.StatusCode.INTERNAL, "Internal error from Core (ExecuteBatchError)"), CALL)
    assert type(error) is errors.UnavailableError
    assert error.retryable
    assert type(error_from_rpc(bare_error(grpc.StatusCode.INTERNAL, "a defect"), CALL)) is errors.InternalError
