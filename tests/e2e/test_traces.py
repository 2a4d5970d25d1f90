"""One trace a step, over all services, as a collector gets it."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from tests.support.local_services import poise

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NUM_STEPS = 2


class Collector:
    """Takes OTLP over HTTP, and keeps what it gets."""

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


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def test_each_step_is_one_trace_from_sampling_to_the_weights(collector: Collector, tmp_path: Path) -> None:
    settings = [f"run.dir={tmp_path / 'run'}", f"train.num_steps={NUM_STEPS}", "train.evaluation.num_prompts=0"]
    settings += [
        f"{program}.tracing.otlp_endpoint={collector.url}" for program in ("generation", "value", "learner", "train")
    ]
    with (tmp_path / "log").open("w") as log:
        flags = [part for setting in settings for part in ("--set", setting)]
        process = poise("run", "--preset", "tiny", *flags, stdout=log, stderr=log)
        assert process.wait(240) == 0, (tmp_path / "log").read_text()[-3000:]
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
