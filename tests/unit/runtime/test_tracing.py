"""Traces and log ids within one process."""

from __future__ import annotations

import json
import logging

import pytest

from poise.runtime.config.settings import LoggingConfig
from poise.runtime.logging import configure_logging, log_ids
from poise.runtime.tracing import call_span, step_span
from poise_client import TRACEPARENT


@pytest.fixture(autouse=True)
def _logging_as_before():
    root = logging.getLogger()
    handlers, level = list(root.handlers), logging.getLogger("poise").level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    logging.getLogger("poise").setLevel(level)


def logged(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    configure_logging(LoggingConfig(format="json"))
    logging.getLogger("poise.oven").info("hot")
    line: dict[str, object] = json.loads(capsys.readouterr().err)
    return line


def test_log_lines_of_a_step_have_its_number_and_trace(capsys):
    traces = {}
    for run, step in (("a", 1), ("a", 1), ("a", 2), ("b", 1)):
        with step_span("sample", run, step):
            line = logged(capsys)
            assert line["step"] == step
            assert TRACEPARENT.get().split("-")[1] == line["trace_id"]
            traces.setdefault((run, step), set()).add(line["trace_id"])
    assert all(len(ids) == 1 for ids in traces.values())
    assert len(set.union(*traces.values())) == 3
    assert "trace_id" not in logged(capsys)
    assert TRACEPARENT.get() == ""


def test_call_belongs_to_the_callers_trace(capsys):
    with step_span("train", "run", 7):
        given = TRACEPARENT.get()
    with call_span("poise.v1.Oven/Bake", (("traceparent", given), ("authorization", "x"))):
        assert logged(capsys)["trace_id"] == given.split("-")[1]


@pytest.mark.parametrize("given", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", b"\xff", "0" * 9000])
def test_malformed_trace_header_is_ignored(given, capsys):
    with call_span("poise.v1.Oven/Bake", (("traceparent", given),)):
        assert "trace_id" not in logged(capsys)


def test_log_ids_nest_and_end_with_their_block(capsys):
    with log_ids(batch="b"):
        with log_ids(step=3):
            assert logged(capsys).items() >= {"batch": "b", "step": 3}.items()
        assert "step" not in logged(capsys)
