"""`poise status`, with the responses of admin apps."""

from __future__ import annotations

import json
import urllib.error
from http.client import RemoteDisconnected
from pathlib import Path
from typing import Any

import pytest
from tests.support.tokens import write_token
from tests.unit.local.test_run_file import load
from tests.unit.orchestrator.storage.test_run_folder import finish

from poise.local.run_file import LocalRun
from poise.local.status import push_problems, show_status
from poise.orchestrator.storage.run_folder import RunFolder
from poise.runtime.config.settings import ConfigError

READY: dict[str, dict[str, Any]] = {
    "generation": {"ready": True, "policy_version": 4, "digest": "", "num_running": 3},
    "value": {
        "ready": True,
        "state": "serving",
        "num_groups_consumed": 12,
        "num_pending": 0,
        "num_dead_letters": 0,
        "probes": [
            {
                "domain": "math",
                "probe_version": 2,
                "num_rows": 512,
                "num_steps_seen": 9,
                "warmup_steps": 4,
                "last_fit_s": 0.0314,
                "label_lag_s": 0.25,
                "configured": "auto",
                "estimator": "score_prefix",
                "errors": [
                    {"estimator": "score_mean", "weighted_error": 0.25},
                    {"estimator": "score_prefix", "weighted_error": 0.125},
                ],
                "quality": {
                    "pearson": 0.871,
                    "brier": 0.0625,
                    "calibration": [
                        {"predicted": 0.125, "realised": 0.25, "count": 40},
                        {"predicted": 0.75, "realised": 0.5, "count": 9},
                    ],
                    "brier_skill": -0.5,
                    "bias": 0.012,
                    "share_clipped": 0.0,
                    "variance_vs_none": 0.3,
                    "variance_vs_rloo": 0.4,
                    "variance_vs_batch_mean": 0.5,
                    "weighted_variance_vs_none": 0.2,
                    "weighted_variance_vs_batch_mean": 0.6,
                },
            },
            {
                "domain": "new",
                "probe_version": 0,
                "num_rows": 2,
                "num_steps_seen": 1,
                "warmup_steps": 4,
                "last_fit_s": 0.0,
                "label_lag_s": None,
                "quality": dict.fromkeys(
                    (
                        "pearson",
                        "brier_skill",
                        "bias",
                        "share_clipped",
                        "variance_vs_none",
                        "variance_vs_rloo",
                        "variance_vs_batch_mean",
                        "brier",
                    )
                )
                | {"calibration": []},
            },
        ],
    },
    "learner": {
        "ready": True,
        "state": "idle",
        "policy_version": 4,
        "digest": "0123456789abcdef",
        "replicas": [
            {"address": "host:1", "policy_version": 4, "digest": "0123456789abcdef", "current": True, "error": ""},
            {"address": "host:2", "policy_version": 3, "digest": "fedcba98", "current": False, "error": "it is slow"},
            {"address": "host:3", "policy_version": 0, "digest": "", "current": False, "error": ""},
        ],
    },
}


@pytest.fixture
def run(tmp_path: Path) -> LocalRun:
    return load(tmp_path)


class Admins:
    """Answers in place of the admin apps; an exception is raised."""

    def __init__(self, run: LocalRun) -> None:
        self.answers: dict[str, Any] = {run.admin_address(name): facts for name, facts in READY.items()}
        self.tokens: list[str | None] = []

    def __call__(self, url: str, token: str | None, path: str, *, timeout_s: float) -> Any:
        assert path == "/status"
        self.tokens.append(token)
        answer = self.answers[url.removeprefix("http://")]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def admins(run: LocalRun, monkeypatch: pytest.MonkeyPatch) -> Admins:
    admins = Admins(run)
    monkeypatch.setattr("poise.local.status.call_admin", admins)
    return admins


def test_ready_services_are_listed_with_their_facts(
    run: LocalRun, admins: Admins, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show_status(run, as_json=False) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"run mine: step 0 of 500, folder {run.dir}"
    assert said[1].endswith("ready, policy version 4, 3 rollouts running")
    assert said[2].endswith("serving, 12 groups consumed, 1 of 2 domains have a fitted estimator")
    header, math, new = (line.split() for line in (said[3], said[4], said[7]))
    facts = dict(zip(header, " ".join(math).replace(" s", "s").split(), strict=True))
    assert facts == {
        "domain": "math",
        "version": "2",
        "rows": "512",
        "steps": "9/4",
        "r": "0.87",
        "brier": "0.062",
        "skill": "-0.50",
        "bias": "+0.012",
        "clipped": "0.00",
        "/none": "0.20",
        "/rloo": "–",
        "/batch": "0.60",
        "lag": "0.25s",
        "fit": "0.031s",
    }
    assert said[5] == "    calibration 0.12→0.25 0.75→0.50"
    errors = "weighted errors score_mean 0.2500, score_prefix 0.1250"
    assert said[6] == f"    estimator auto chose score_prefix; {errors}"
    assert new[4:13] == ["–"] * 9
    assert said[8].endswith("idle, policy version 4 (01234567), 1 of 3 replicas up to date")
    assert [" ".join(line.split()) for line in said[9:12]] == [
        "replica host:1 serves version 4 (01234567), up to date",
        "replica host:2 serves version 3 (fedcba98), it is slow",
        "replica host:3 serves version 0, catching up",
    ]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"ready": False, "reason": "the model is loading"}, "not ready: the model is loading"),
        (ConnectionRefusedError(), "not ready: is not running. Start it with `poise up`"),
        (TimeoutError(), "not ready: is not running"),
        (
            urllib.error.HTTPError("", 401, "Unauthorized", {}, None),
            "not ready: the admin app rejected the request: HTTP Error 401",
        ),  # type: ignore[arg-type]
        (RemoteDisconnected("gone"), "is not running"),
        (ValueError(), "not ready: another program listens at"),
        ([1], "not ready: another program listens at"),
        ({}, "not ready: another program listens at"),
    ],
)
def test_service_that_is_not_ready_gives_status_1(
    run: LocalRun, admins: Admins, capsys: pytest.CaptureFixture[str], answer: Any, reason: str
) -> None:
    admins.answers[run.admin_address("learner")] = answer
    assert show_status(run, as_json=False) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("learner"))
    assert reason in line


def test_json_contains_all_facts(run: LocalRun, admins: Admins, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_status(run, as_json=True) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["services"] == READY
    assert printed["run"]["next_step"] == 0


def test_progress_of_the_run_is_shown(run: LocalRun, admins: Admins, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(run.dir)
    folder.open("mine", {})
    finish(folder, 0)
    folder.close()
    show_status(run, as_json=False)
    assert "step 1 of 500, folder" in capsys.readouterr().out
    (run.dir / "state.json").write_text("{")
    with pytest.raises(ConfigError, match=r"state\.json is damaged"):
        show_status(run, as_json=False)


def test_token_is_sent_to_the_services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_token(tmp_path / "token", "open-sesame")
    base = {"model": "org/model", "train": {"tasks": [{"kind": "digits"}]}}
    run = load(tmp_path, base | {"value": {"auth": {"token_file": str(tmp_path / "token")}}})
    admins = Admins(run)
    monkeypatch.setattr("poise.local.status.call_admin", admins)
    show_status(run, as_json=True)
    assert admins.tokens == ["open-sesame"] * 3


def test_waiting_labels_and_dead_letters_are_counted(
    run: LocalRun, admins: Admins, capsys: pytest.CaptureFixture[str]
) -> None:
    admins.answers[run.admin_address("value")] = READY["value"] | {"num_pending": 7, "num_dead_letters": 2}
    show_status(run, as_json=False)
    assert (
        "12 groups consumed, 7 waiting, 2 dead letters (see `poise queue`), 1 of 2 domains" in capsys.readouterr().out
    )


def test_push_problems_are_listed_by_replica(run: LocalRun, admins: Admins) -> None:
    assert push_problems(run) == "pushing to host:2: it is slow"
    admins.answers[run.admin_address("learner")] = ConnectionRefusedError()
    assert push_problems(run) == ""
