import contextlib
import threading

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from tests.integration.runtime.process import TIMEOUT_S, eventually, run_stage

from poise_proto.v1 import (
    errors_pb2,
    generation_pb2,
    generation_pb2_grpc,
    value_pb2,
    value_pb2_grpc,
)

TOKEN = "hunter2-hunter2"
AUTHORISED = (("authorization", f"Bearer {TOKEN}"),)
MAX_RPCS = 3


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage")
    with run_stage(folder, f"grpc.max_concurrent_rpcs={MAX_RPCS}", token=TOKEN) as stage:
        stage.wait_until_ready()
        yield stage


@pytest.fixture
def channel(running):
    with running.channel() as channel:
        yield channel


def probe(channel, domain="", metadata=AUTHORISED):
    stub = value_pb2_grpc.ValueServiceStub(channel)
    return stub.GetProbe(value_pb2.GetProbeRequest(domain=domain), timeout=TIMEOUT_S, metadata=metadata)


def start_probe(channel, domain):
    stub = value_pb2_grpc.ValueServiceStub(channel)
    return stub.GetProbe.future(value_pb2.GetProbeRequest(domain=domain), timeout=TIMEOUT_S, metadata=AUTHORISED)


def start_stream(channel, run_id=""):
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    request = generation_pb2.StreamTrajectoriesRequest(run_id=run_id)
    return stub.StreamTrajectories(request, timeout=TIMEOUT_S, metadata=AUTHORISED)


def details_of(error):
    """Return the rich details of an error by type name."""
    found = {}
    for packed in rpc_status.from_call(error).details:
        for kind in (errors_pb2.PoiseErrorDetail, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            if packed.Is(kind.DESCRIPTOR):
                found[kind.DESCRIPTOR.name] = kind.FromString(packed.value)
    return found


def count(running, event):
    return running.events().count(event)


@pytest.mark.parametrize("service", ["", "poise.v1.ValueService", "poise.v1.GenerationService"])
def test_health_follows_readiness_without_a_token(running, channel, service):
    def status():
        request = health_pb2.HealthCheckRequest(service=service)
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT_S).status

    serving = health_pb2.HealthCheckResponse.ServingStatus
    eventually(lambda: status() == serving.SERVING)
    with running.rest() as rest:
        rest.post("/admin/v1/pause")
        eventually(lambda: status() == serving.NOT_SERVING)
        rest.post("/admin/v1/resume")
    eventually(lambda: status() == serving.SERVING)


def test_health_can_be_watched(running, channel):
    serving = health_pb2.HealthCheckResponse.ServingStatus
    answers = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(service="poise.v1.ValueService"), timeout=TIMEOUT_S
    )
    with running.rest() as rest:
        assert any(answer.status == serving.SERVING for answer in answers)  # after at most one NOT_SERVING
        rest.post("/admin/v1/pause")
        assert next(answers).status == serving.NOT_SERVING
        rest.post("/admin/v1/resume")
        assert next(answers).status == serving.SERVING
    answers.cancel()


def test_reflection_lists_the_services(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    [answer] = stub.ServerReflectionInfo(iter([request]), timeout=TIMEOUT_S, metadata=AUTHORISED)
    assert {service.name for service in answer.list_services_response.service} == {
        "poise.v1.ValueService",
        "poise.v1.GenerationService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def test_reflection_needs_the_token(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest()]), timeout=TIMEOUT_S))
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    "authorization", [None, TOKEN, "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}"]
)
def test_call_without_the_token_is_unauthenticated(channel, authorization):
    with pytest.raises(grpc.RpcError) as caught:
        probe(channel, metadata=() if authorization is None else (("authorization", authorization),))
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert details_of(caught.value)["PoiseErrorDetail"].reason == errors_pb2.ERROR_REASON_UNAUTHENTICATED
    assert TOKEN not in caught.value.details()


def test_stream_without_the_token_is_unauthenticated(channel):
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    with pytest.raises(grpc.RpcError) as caught:
        next(stub.StreamTrajectories(generation_pb2.StreamTrajectoriesRequest(), timeout=TIMEOUT_S))
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_bug_is_internal_logged_once_and_hidden(running, channel):
    before = running.log.count("RuntimeError: the s3cret of the pharaohs")
    with pytest.raises(grpc.RpcError) as failed:
        probe(channel, "defect")
    assert failed.value.code() == grpc.StatusCode.INTERNAL
    assert "pharaohs" not in failed.value.details() + str(failed.value.trailing_metadata())
    detail = details_of(failed.value)["PoiseErrorDetail"]
    assert (detail.reason, detail.retryable) == (errors_pb2.ERROR_REASON_INTERNAL, False)
    assert running.log.count("RuntimeError: the s3cret of the pharaohs") == before + 1
    assert 'raise RuntimeError("the s3cret of the pharaohs")' in running.log


def test_status_names_as_many_wrong_fields_as_fit(channel):
    with pytest.raises(grpc.RpcError) as caught:
        probe(channel, "many-wrong-fields")
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    violations = details_of(caught.value)["BadRequest"].field_violations
    named = violations[:-1]
    assert [violation.field for violation in named] == [f"groups[{i}].domain" for i in range(len(named))]
    assert len(named) >= 5
    assert violations[-1].description == f"and {500 - len(named)} more wrong fields"


def test_long_message_of_any_script_is_shortened(channel):
    with pytest.raises(grpc.RpcError) as caught:
        probe(channel, "long-message")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert caught.value.details().startswith("长" * 100)
    details = details_of(caught.value)
    assert details["PoiseErrorDetail"].remedy.startswith("也" * 50)
    assert details["RetryInfo"].retry_delay.ToMilliseconds() == 2500


def test_work_cancelled_inside_the_service_is_answered(channel):
    with pytest.raises(grpc.RpcError) as failed:
        probe(channel, "inner-cancel")
    assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
    assert details_of(failed.value)["PoiseErrorDetail"].retryable


def test_status_set_by_a_handler_is_kept(channel):
    with pytest.raises(grpc.RpcError) as failed:
        probe(channel, "abort")
    assert (failed.value.code(), failed.value.details()) == (grpc.StatusCode.DATA_LOSS, "by hand")


def test_cancelled_call_reaches_the_handler(running, channel):
    num_before = count(running, "cancelled")
    call = start_probe(channel, "hang")
    eventually(lambda: count(running, "hanging") > num_before)
    call.cancel()
    eventually(lambda: count(running, "cancelled") > num_before)


@pytest.mark.parametrize("run_id", ["", "hang"])
def test_client_leaving_mid_stream_ends_the_handler(running, channel, run_id):
    """Both while a message waits to be read, and while the next one is in the making."""
    num_closed, log_before = count(running, "closed"), running.log
    stream = start_stream(channel, run_id)
    next(stream)
    stream.cancel()
    eventually(lambda: count(running, "closed") > num_closed)
    assert "ERROR" not in running.log.removeprefix(log_before)


def test_broken_connection_ends_the_handler(running):
    num_closed = count(running, "closed")
    channel = running.channel()
    next(start_stream(channel))
    channel.close()
    eventually(lambda: count(running, "closed") > num_closed)


def test_aborted_upload_ends_the_handler(running, channel):
    """By a cancellation, or by requests that end: gRPC promises neither, so servicers must know a whole upload."""
    sent = threading.Event()

    def chunks():
        yield generation_pb2.UpdateWeightsRequest()
        sent.wait(TIMEOUT_S)

    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    call = stub.UpdateWeights.future(chunks(), timeout=TIMEOUT_S, metadata=AUTHORISED)
    running.wait_for_event("chunk 1")
    call.cancel()
    running.wait_for_event("push over")
    sent.set()


def test_calls_beyond_the_limit_of_their_rpc_are_rejected(running, channel):
    with contextlib.ExitStack() as stack:
        num_before = count(running, "hanging")
        for _ in range(MAX_RPCS):
            stack.callback(start_probe(channel, "hang").cancel)
        eventually(lambda: count(running, "hanging") == num_before + MAX_RPCS)
        with pytest.raises(grpc.RpcError) as caught:
            probe(channel)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        details = details_of(caught.value)
        assert details["PoiseErrorDetail"].reason == errors_pb2.ERROR_REASON_BUSY
        assert details["PoiseErrorDetail"].retryable
        assert details["RetryInfo"].retry_delay.ToMilliseconds() == 1000
        stream = start_stream(channel)
        assert next(stream).group_id  # other RPCs have places of their own
        stream.cancel()
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)

    def has_room():
        with contextlib.suppress(grpc.RpcError):
            return probe(channel).num_pending == 7

    eventually(has_room)


def test_calls_are_timed_by_method_and_code(running, channel):
    probe(channel)
    with pytest.raises(grpc.RpcError):
        probe(channel, "defect")
    with pytest.raises(grpc.RpcError):
        probe(channel, "abort")
    with running.rest() as rest:
        metrics = rest.get("/metrics").text
    for code in ("OK", "INTERNAL", "DATA_LOSS"):
        assert f'poise_stage_rpc_seconds_count{{code="{code}",method="GetProbe"}}' in metrics


def test_unknown_method_is_unimplemented(channel):
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/poise.v1.ValueService/Forget")(b"", timeout=TIMEOUT_S, metadata=AUTHORISED)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("method", "kind", "message"),
    [
        ("poise.v1.ValueService/GetProbe", "unary_unary", "poise.v1.GetProbeRequest"),
        ("poise.v1.GenerationService/StreamTrajectories", "unary_stream", "poise.v1.StreamTrajectoriesRequest"),
        ("poise.v1.GenerationService/UpdateWeights", "stream_unary", "poise.v1.UpdateWeightsRequest"),
        ("grpc.health.v1.Health/Check", "unary_unary", "grpc.health.v1.HealthCheckRequest"),
        (
            "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            "stream_stream",
            "grpc.reflection.v1alpha.ServerReflectionRequest",
        ),
    ],
)
def test_unparsable_bytes_are_rejected_with_the_message_name(running, channel, method, kind, message):
    def call(metadata):
        request = iter([b"\xff\xff\xff"]) if kind.startswith("stream") else b"\xff\xff\xff"
        answer = getattr(channel, kind)(f"/{method}")(request, timeout=TIMEOUT_S, metadata=metadata)
        return list(answer) if kind.endswith("stream") else answer

    with pytest.raises(grpc.RpcError) as caught:
        call(AUTHORISED)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    [violation] = details_of(caught.value)["BadRequest"].field_violations
    assert violation.field == "request"
    assert violation.description.startswith(f"is not a {message}: ")
    with running.rest() as rest:
        counted = f'poise_stage_rpc_seconds_count{{code="INVALID_ARGUMENT",method="{method.rpartition("/")[2]}"}}'
        assert counted in rest.get("/metrics").text
    if not method.startswith("grpc.health"):
        with pytest.raises(grpc.RpcError) as caught:
            call(())
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_message_beyond_the_limit_is_rejected_with_a_remedy(channel):
    with pytest.raises(grpc.RpcError) as caught:
        probe(channel, "x" * (5 * 2**20))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "the limit is 4194304" in caught.value.details()
    assert "rollouts_per_prompt" in details_of(caught.value)["PoiseErrorDetail"].remedy
