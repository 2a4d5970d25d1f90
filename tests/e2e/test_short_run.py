"""Six steps of the tiny preset: one trace a step over all services, and the recorded weights after every step."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from tests.support.local_services import poise

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

RECORDED = json.loads((Path(__file__).parent / "data" / "tiny_digests.json").read_text())
NUM_STEPS = len(RECORDED["digests"])
TIMEOUT_S = 500.0


class Collector:
    """Receives OTLP over HTTP and keeps the spans."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str, bytes]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    names = {a.key: a.value.string_value for a in resource.resource.attributes}
                    for scope in resource.scope_spans:
                        collector.spans += [(names["service.name"], span.name, span.trace_id) for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture(scope="module")
def run_folder(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("short") / "run"
    settings = [f"run.dir={folder}", f"train.num_steps={NUM_STEPS}", "train.evaluation.num_prompts=0"]
    settings += [
        f"{program}.tracing.otlp_endpoint={collector.url}" for program in ("generation", "value", "learner", "train")
    ]
    log = folder.with_name("log")
    with log.open("w") as output:
        flags = [part for setting in settings for part in ("--set", setting)]
        process = poise("run", "--preset", "tiny", *flags, stdout=output, stderr=output)
        assert process.wait(TIMEOUT_S) == 0, log.read_text()[-3000:]
    return folder


def this_machine() -> dict[str, str]:
    """Return the facts that decide the bits of a run."""
    (vendor, *_) = (
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith(("vendor_id", "CPU implementer"))
    )
    return {"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability(), "vendor": vendor}


def test_each_step_is_one_trace(collector: Collector, run_folder: Path) -> None:
    by_trace: dict[bytes, set[tuple[str, str]]] = {}
    for service, name, trace_id in collector.spans:
        by_trace.setdefault(trace_id, set()).add((service, name.rpartition(".")[2]))
    steps = [spans for spans in by_trace.values() if ("poise-train", "sample") in spans]
    assert len(steps) == NUM_STEPS
    for spans in steps:
        assert spans >= {
            ("poise-train", "train"),
            ("poise-generation", "GenerationService/StreamTrajectories"),
            ("poise-value", "ValueService/EstimateBaselines"),
            ("poise-value", "ValueService/PublishLabels"),
            ("poise-learner", "LearnerService/SubmitAdvantages"),
        }


@pytest.mark.skipif(this_machine() != RECORDED["machine"], reason=f"recorded on {RECORDED['machine']}")
def test_weights_after_each_step_are_the_recorded_ones(run_folder: Path) -> None:
    answers = sorted((run_folder / "services" / "learner" / "journal").glob("answer-*.json"))

    digests = [json.loads(path.read_text())["digest"] for path in answers]

    assert digests == RECORDED["digests"]
