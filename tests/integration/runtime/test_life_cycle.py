import json
import os
import signal
import socket
import ssl
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.integration.runtime.process import TIMEOUT_S, eventually

from poise_proto.v1 import value_pb2, value_pb2_grpc

CERTIFICATE = Path(__file__).parent / "data" / "localhost.crt"
KEY = CERTIFICATE.with_suffix(".key")
RENEWED = CERTIFICATE.with_name("renewed.crt")


def probe(channel, domain="", **options):
    return value_pb2_grpc.ValueServiceStub(channel).GetProbe(
        value_pb2.GetProbeRequest(domain=domain), timeout=TIMEOUT_S, **options
    )


def health_of(channel, service=""):
    request = health_pb2.HealthCheckRequest(service=service)
    answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT_S)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def test_bound_ports_are_in_the_file_and_the_log(stage):
    running = stage()
    addresses = running.addresses()
    running.wait_until_ready()
    assert addresses["pid"] == running.process.pid
    assert f"gRPC on {addresses['grpc']}, admin on http://{addresses['admin']}" in running.log
    assert not addresses["grpc"].endswith(":0")
    with running.channel() as channel:
        assert probe(channel).num_pending == 7


def test_starting_service_is_not_ready(stage):
    running = stage("start=hang")
    with running.channel() as channel, running.rest() as rest:
        assert health_of(channel) == health_of(channel, "poise.v1.ValueService") == "NOT_SERVING"
        assert rest.get("/healthz").status_code == 200
        answer = rest.get("/readyz")
        assert (answer.status_code, answer.text) == (503, "starting")


def test_signal_during_the_start_ends_it(stage):
    running = stage("start=hang")
    running.addresses()
    running.wait_for_log("not ready: starting")
    running.signal()
    assert running.exit_status() == 0
    assert "released everything" in running.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_lets_accepted_work_finish(stage, number):
    running = stage()
    with running.channel() as channel:
        call = value_pb2_grpc.ValueServiceStub(channel).GetProbe.future(
            value_pb2.GetProbeRequest(domain="until-draining"), timeout=TIMEOUT_S
        )
        running.wait_for_event("waiting")
        running.signal(number)
        assert call.result().num_pending == 7
        assert running.exit_status() == 0
    assert running.log.index("draining for at most 30 s") < running.log.index("released everything")
    assert not running.error_lines()


def test_health_is_not_serving_while_draining(stage, tmp_path):
    running = stage("drain=until-released", f"release={tmp_path / 'release'}")
    running.wait_until_ready()
    with running.channel() as channel:
        eventually(lambda: health_of(channel) == "SERVING")
        running.signal()
        running.wait_for_log("draining")
        eventually(lambda: health_of(channel, "poise.v1.ValueService") == "NOT_SERVING")
        (tmp_path / "release").touch()
        assert running.exit_status() == 0


def test_second_signal_exits_at_once(stage):
    running = stage("drain=hang")
    running.wait_until_ready()
    running.signal()
    running.wait_for_log("draining")
    running.signal()
    assert running.exit_status() == 130
    assert "released everything" not in running.log


def test_signal_after_a_drain_request_is_the_first(stage, tmp_path):
    running = stage("drain=until-released", f"release={tmp_path / 'release'}")
    running.wait_until_ready()
    with running.rest() as rest:
        assert rest.post("/admin/v1/drain").status_code == 202
        running.wait_for_log("draining")
        running.signal()
        assert rest.get("/healthz").text == "ok"
    (tmp_path / "release").touch()
    assert running.exit_status() == 0


def test_unfinished_work_is_abandoned_after_drain_timeout(stage):
    running = stage("drain=hang", "drain_timeout_s=0.1")
    running.wait_until_ready()
    running.signal()
    assert running.exit_status() == 0
    assert "did not finish within drain_timeout_s = 0.1" in running.log
    assert "released everything" in running.log


def test_failed_drain_is_logged_with_status_1(stage):
    running = stage("drain=defect")
    running.wait_until_ready()
    running.signal()
    assert running.exit_status() == 1
    assert "stage cannot drain: a slip of the pen" in running.log
    assert "released everything" in running.log


def test_known_start_failure_is_one_line_and_status_1(stage):
    running = stage("start=backend-down")
    assert running.exit_status() == 1
    assert [line.partition("poise.runtime.server: ")[2] for line in running.error_lines()] == [
        "stage cannot start: the cupboard does not answer"
    ]
    assert "Traceback" not in running.log
    assert "released everything" in running.log


def test_start_with_wrong_settings_gives_status_2(stage):
    running = stage("start=misconfigured")
    assert running.exit_status() == 2
    [line] = running.error_lines()
    assert "stage cannot start: cupboard.key: fits no lock; set another" in line


def test_bug_during_the_start_logs_its_traceback(stage):
    running = stage("start=defect")
    assert running.exit_status() == 1
    assert running.log.count("RuntimeError: a slip of the pen") == 1


def test_failure_during_the_start_gives_status_1(stage):
    running = stage("start=give-up")
    assert running.exit_status() == 1
    assert "stage failed: the engine died while it was loading" in running.log


def test_failing_readiness_check_ends_the_service(stage):
    running = stage("start=unreadable")
    assert running.exit_status() == 1
    assert "RuntimeError: a slip of the pen" in running.log
    assert "stage failed: the readiness check raised an exception" in running.log


def test_later_failure_gives_status_1(stage):
    running = stage()
    running.wait_until_ready()
    with running.channel() as channel:
        probe(channel, "fail")
    assert running.exit_status() == 1
    assert "stage failed: the engine died" in running.log
    assert "released everything" in running.log


@pytest.mark.parametrize("section", ["grpc", "admin"])
def test_taken_port_is_one_line_and_status_1(stage, section):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        running = stage(f"{section}.port={port}")
        assert running.exit_status() == 1
    [line] = running.error_lines()
    assert f"{section}: cannot listen on 127.0.0.1:{port}" in line
    assert f"et another {section}.port, or 0" in line
    assert len(running.log.splitlines()) == 2, running.log  # and the settings


def test_two_services_cannot_share_a_port(stage):
    port = stage().addresses()["grpc"].rpartition(":")[2]
    assert stage(f"grpc.port={port}").exit_status() == 1


def test_wrong_settings_are_all_named_with_status_2(stage):
    running = stage("grpc.prot=1", "start=never", "drain_timeout_s=0")
    assert running.exit_status() == 2
    lines = running.log.splitlines()
    assert len(lines) == 3, running.log
    assert any("grpc.prot: unknown; did you mean 'port'?" in line for line in lines)


@pytest.mark.parametrize("section", ["grpc", "admin"])
def test_open_address_without_a_token_is_rejected(stage, section):
    running = stage(f"{section}.host=0.0.0.0")
    assert running.exit_status() == 2
    assert f"{section}.host: other machines can reach 0.0.0.0" in running.log


def test_json_logs_do_not_contain_the_token(stage):
    running = stage("logging.format=json", "logging.level=DEBUG", token="hunter2-hunter2")
    running.wait_until_ready()
    with running.channel() as channel:
        probe(channel, metadata=[("authorization", "Bearer hunter2-hunter2")])
        with pytest.raises(grpc.RpcError):
            probe(channel, "defect", metadata=[("authorization", "Bearer hunter2-hunter2")])
        with pytest.raises(grpc.RpcError):
            probe(channel, metadata=[("authorization", "Bearer hunter3")])
    running.signal()
    assert running.exit_status() == 0
    entries = [json.loads(line) for line in running.log.splitlines() if line != "released everything"]
    assert [entry["traceback"].splitlines()[-1] for entry in entries if "traceback" in entry] == [
        "RuntimeError: the s3cret of the pharaohs"
    ]
    assert "hunter" not in running.log


def test_certificate_enables_tls(stage):
    running = stage(f"grpc.tls_cert_file={CERTIFICATE}", f"grpc.tls_key_file={KEY}")
    target = running.addresses()["grpc"]
    with grpc.secure_channel(target, grpc.ssl_channel_credentials(CERTIFICATE.read_bytes())) as channel:
        assert probe(channel).num_pending == 7
    with grpc.insecure_channel(target) as channel, pytest.raises(grpc.RpcError) as caught:
        probe(channel)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert ssl.get_server_certificate(("127.0.0.1", int(target.rpartition(":")[2]))).startswith("-----BEGIN")


@pytest.mark.parametrize("certificate", ["missing.pem", str(KEY)])
def test_unusable_certificate_is_one_line_and_status_2(stage, certificate):
    running = stage(f"grpc.tls_cert_file={certificate}", f"grpc.tls_key_file={KEY}")
    assert running.exit_status() == 2
    [line] = running.error_lines()
    assert "grpc.tls_cert_file, grpc.tls_key_file: cannot be used" in line
    assert "Traceback" not in running.log


def test_renewed_certificate_is_used_without_a_restart(stage, tmp_path):
    files = (tmp_path / "tls.crt", tmp_path / "tls.key")

    def write(*contents: bytes) -> None:
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
            os.utime(file, ns=(0, time.time_ns()))  # however coarse the clock of the file system is

    def shown() -> str:
        return ssl.get_server_certificate(("127.0.0.1", port))

    write(CERTIFICATE.read_bytes(), KEY.read_bytes())
    running = stage(f"grpc.tls_cert_file={files[0]}", f"grpc.tls_key_file={files[1]}")
    port = int(running.addresses()["grpc"].rpartition(":")[2])
    assert shown() == CERTIFICATE.read_text()
    write(RENEWED.read_bytes(), RENEWED.with_suffix(".key").read_bytes())
    assert shown() == RENEWED.read_text()
    write(CERTIFICATE.read_bytes(), b"no key")
    assert shown() == RENEWED.read_text()
    assert "the new certificate cannot be used, the previous one stays" in running.log
