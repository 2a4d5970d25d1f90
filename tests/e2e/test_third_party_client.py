"""Calls every unary RPC with `buf curl`, which learns the protos only through reflection."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from google.rpc.error_details_pb2 import BadRequest

from poise.local.run_file import LocalRun
from poise_proto.v1.errors_pb2 import ErrorReason, PoiseErrorDetail

BUF = Path(sys.executable).with_name("buf")


def buf_curl(address: str, method: str, request: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    token = Path(os.environ["POISE_TOKEN_FILE"]).read_text().strip()
    access = ["--header", f"authorization: Bearer {token}", "--reflect-header", "*"]
    url = f"http://{address}/{method}"
    return subprocess.run(
        [BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", *access, "--data", "@-", url],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=60,
    )


def answer(address: str, method: str, request: dict[str, Any]) -> dict[str, Any]:
    done = buf_curl(address, method, request)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def tensor(values: Any) -> dict[str, Any]:
    array = np.asarray(values, "<f4")
    return {"dtype": "DTYPE_FLOAT32", "shape": list(array.shape), "data": base64.b64encode(array.tobytes()).decode()}


def rollout(seed: int) -> dict[str, Any]:
    source = np.random.default_rng(seed)
    return {
        "promptHidden": tensor(source.normal(size=64)),
        "responseHidden": tensor(source.normal(size=64)),
        "outputEntropy": {"mean": 1.0},
        "reasoningEntropy": {},
        "answerEntropy": {},
    }


def test_generation(tiny_run: LocalRun) -> None:
    address = tiny_run.train.endpoints.generation[0]
    policy = answer(address, "poise.v1.GenerationService/GetPolicy", {})
    assert policy["engine"] == "torch"
    assert policy["ready"] is True
    assert policy["hiddenSize"] == 64
    encoded = answer(
        address, "poise.v1.GenerationService/EncodePrompts", {"prompts": [{"groupId": "a", "text": "max123="}]}
    )
    assert encoded["groupId"] == "a"
    assert encoded["promptHidden"]["shape"] == [64]


def test_value(tiny_run: LocalRun) -> None:
    address, service = tiny_run.train.endpoints.value, "poise.v1.ValueService"
    groups = [{"groupId": "a", "domain": "curl", "rollouts": [rollout(1), rollout(2)]}]
    questions = [groups[0] | {"rewards": tensor([0, 1])}]
    asked = answer(address, f"{service}/EstimateBaselines", {"runId": "curl", "step": 0, "groups": questions})
    assert asked["groups"][0]["status"] == "ESTIMATE_STATUS_NO_PROBE"
    prompt = {"groupId": "a", "domain": "curl", "promptHidden": tensor(np.ones(64))}
    scored = answer(address, f"{service}/ScorePrompts", {"prompts": [prompt]})
    assert scored["prompts"] == [{"groupId": "a", "status": "ESTIMATE_STATUS_NO_PROBE"}]
    label = {"schemaVersion": 2, "runId": "curl", "step": 0, **groups[0], "rewards": tensor([0, 1])}
    label["numRollouts"] = 2
    before = num_received(answer(address, f"{service}/GetProbe", {}))
    assert answer(address, f"{service}/PublishLabels", {"groups": [label]}) == {"numQueued": 1}
    assert num_received(answer(address, f"{service}/GetProbe", {})) == before + 1


def num_received(report: dict[str, Any]) -> int:
    """Return how many groups the service has consumed or still has in its queue."""
    return sum(int(report.get(name, 0)) for name in ("numGroupsConsumed", "numPending"))  # JSON leaves zeros out


def test_learner(tiny_run: LocalRun) -> None:
    address, service = tiny_run.train.endpoints.learner, "poise.v1.LearnerService"
    status = answer(address, f"{service}/GetStatus", {})
    assert status["replicas"][0]["current"] is True
    export = answer(address, f"{service}/ExportModel", {"name": "by-curl"})
    assert (Path(export["path"]) / "config.json").exists()


def test_errors_name_the_field(tiny_run: LocalRun) -> None:
    done = buf_curl(tiny_run.train.endpoints.learner, "poise.v1.LearnerService/ExportModel", {"name": "../up"})
    assert done.returncode != 0
    error = json.loads(done.stderr)
    assert error["code"] == "invalid_argument"
    packed = {detail["type"]: base64.b64decode(detail["value"] + "==") for detail in error["details"]}
    violation = BadRequest.FromString(packed["google.rpc.BadRequest"]).field_violations[0]
    assert violation.field == "name"
    assert "required:" in violation.description
    detail = PoiseErrorDetail.FromString(packed["poise.v1.PoiseErrorDetail"])
    assert detail.reason == ErrorReason.ERROR_REASON_INVALID_REQUEST
