import httpx
import pytest
from tests.integration.runtime.process import run_stage

import poise

TOKEN = "hunter2-hunter2"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with run_stage(tmp_path_factory.mktemp("stage"), token=TOKEN) as stage:
        stage.wait_until_ready()
        yield stage


@pytest.fixture
def rest(running):
    with running.rest() as rest:
        yield rest


@pytest.fixture
def stranger(rest):
    """A client without the token."""
    with httpx.Client(base_url=rest.base_url) as stranger:
        yield stranger


ADMIN_ROUTES = [
    ("GET", "/admin/v1/status"),
    ("GET", "/admin/v1/config"),
    ("POST", "/admin/v1/pause"),
    ("POST", "/admin/v1/resume"),
    ("POST", "/admin/v1/drain"),
    ("POST", "/admin/v1/checkpoint"),
    ("GET", "/admin/v1/raise/{name}"),
]


def test_health_and_metrics_need_no_token(stranger):
    assert (stranger.get("/healthz").status_code, stranger.get("/healthz").text) == (200, "ok")
    assert (stranger.get("/readyz").status_code, stranger.get("/readyz").text) == (200, "ready")
    metrics = stranger.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert "# TYPE poise_stage_rpc_seconds histogram" in metrics.text


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
@pytest.mark.parametrize("authorization", [None, f"Bearer {TOKEN}x", TOKEN])
def test_admin_routes_need_the_token(stranger, method, path, authorization):
    headers = {} if authorization is None else {"authorization": authorization}
    answer = stranger.request(method, path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["reason"] == "UNAUTHENTICATED"
    assert answer.json()["remedy"]
    assert stranger.get("/readyz").status_code == 200


def test_status_contains_state_and_facts(rest):
    assert rest.get("/admin/v1/status").json() == {
        "service": "stage",
        "version": poise.__version__,
        "ready": True,
        "reason": "",
        "events": [],
    }


def test_settings_are_shown_without_secrets(rest):
    answer = rest.get("/admin/v1/config")
    assert answer.json()["grpc"]["max_concurrent_rpcs"] == 256
    assert answer.json()["auth"]["token"] == "**********"
    assert TOKEN not in answer.text


def test_pause_and_resume_return_the_new_state(rest):
    assert rest.post("/admin/v1/pause").json()["reason"] == "paused"
    assert (rest.get("/readyz").status_code, rest.get("/readyz").text) == (503, "paused")
    assert rest.post("/admin/v1/resume").json()["ready"] is True
    assert rest.get("/readyz").status_code == 200


def test_checkpoint_returns_what_was_written(rest):
    assert rest.post("/admin/v1/checkpoint").json() == {"path": "somewhere"}


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        ("Unauthenticated", 401, "UNAUTHENTICATED"),
        ("Forbidden", 403, "FORBIDDEN"),
        ("NotFound", 404, "NOT_FOUND"),
        ("VersionMismatch", 409, "VERSION_MISMATCH"),
        ("LabelsConsumed", 409, "LABELS_CONSUMED"),
        ("TrainingStopped", 409, "TRAINING_STOPPED"),
        ("Conflict", 409, "CONFLICT"),
        ("QueueFull", 429, "QUEUE_FULL"),
        ("Busy", 429, "BUSY"),
        ("Draining", 503, "DRAINING"),
        ("BackendDown", 503, "BACKEND_DOWN"),
    ],
)
def test_each_error_has_its_http_status(rest, error, status, reason):
    answer = rest.get(f"/admin/v1/raise/{error}")
    assert answer.status_code == status
    assert answer.json() == {
        "reason": reason,
        "message": "on demand",
        "remedy": "Ask for another.",
        "violations": [],
    }


def test_rejected_field_is_named(rest):
    answer = rest.get("/admin/v1/raise/InvalidRequest")
    assert answer.status_code == 422
    assert answer.json()["violations"] == [{"field": "name", "description": "is refused"}]


def test_parameter_of_wrong_type_is_named(rest):
    answer = rest.get("/admin/v1/raise/Busy", params={"retry_after_s": "soon"})
    assert answer.status_code == 422
    assert answer.json()["reason"] == "INVALID_REQUEST"
    [violation] = answer.json()["violations"]
    assert violation["field"] == "retry_after_s"


@pytest.mark.parametrize(("delay_s", "header"), [(0.2, "1"), (7.4, "7")])
def test_retry_delay_is_a_header_in_seconds(rest, delay_s, header):
    assert rest.get("/admin/v1/raise/Busy", params={"retry_after_s": delay_s}).headers["retry-after"] == header


def test_bug_is_500_logged_once_and_hidden(running, rest):
    answer = rest.get("/admin/v1/raise/Defect")
    assert answer.status_code == 500
    assert answer.json()["reason"] == "INTERNAL"
    assert "pharaohs" not in answer.text
    running.wait_for_log("RuntimeError: the s3cret of the pharaohs")
    assert running.log.count("RuntimeError: the s3cret of the pharaohs") == 1


@pytest.mark.parametrize(
    ("method", "path", "status", "reason"),
    [("GET", "/admin/v2/status", 404, "NOT_FOUND"), ("GET", "/admin/v1/pause", 405, "INVALID_REQUEST")],
)
def test_unknown_route_has_the_error_form(rest, method, path, status, reason):
    answer = rest.request(method, path)
    assert (answer.status_code, answer.json()["reason"]) == (status, reason)


def test_openapi_describes_every_route_and_its_errors(stranger):
    document = stranger.get("/openapi.json").json()
    assert set(document["paths"]) == {"/healthz", "/readyz", "/metrics"} | {path for _, path in ADMIN_ROUTES}
    assert "503" in document["paths"]["/readyz"]["get"]["responses"]
    error = {"$ref": "#/components/schemas/ErrorResponse"}
    for method, path in ADMIN_ROUTES:
        route = document["paths"][path][method.lower()]
        assert route["summary"]
        for status in ("401", "422", "500", "503"):
            assert route["responses"][status]["content"]["application/json"]["schema"] == error, (path, status)
    assert document["components"]["schemas"]["ErrorResponse"]["properties"].keys() == {
        "reason",
        "message",
        "remedy",
        "violations",
    }
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_openapi_describes_the_responses(stranger, rest):
    document = stranger.get("/openapi.json").json()
    schemas = document["components"]["schemas"]

    def answered(method: str, path: str, status: str = "200") -> dict[str, object]:
        content = document["paths"][f"/admin/v1/{path}"][method]["responses"][status]["content"]
        return schemas[content["application/json"]["schema"]["$ref"].rpartition("/")[2]]

    state = {"service", "version", "ready", "reason"}
    for method, path, status in (("post", "pause", "200"), ("post", "resume", "200"), ("post", "drain", "202")):
        assert answered(method, path, status)["properties"].keys() == state
    assert set(answered("get", "status")["required"]) == state
    assert answered("get", "status")["additionalProperties"] is True  # facts of the service's own
    assert "events" in rest.get("/admin/v1/status").json()
    assert answered("post", "checkpoint")["required"] == ["path"]
    assert answered("get", "config")["type"] == "object"
    fields = [*schemas["ServiceState"]["properties"].values(), *schemas["Checkpointed"]["properties"].values()]
    assert all(field["description"] for field in fields)
