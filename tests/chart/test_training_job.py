"""The training Job replaces, ignores or gives up after failed pods, by their exit status."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.chart.rendering import CHART, VALUES, Manifest, merged, render, values_of

from poise.runtime.cli.exit_status import FAILED, INTERRUPTED, WRONG_SETTINGS

OWN_SECRETS: Manifest = {
    "auth": {"existingSecret": "token"},
    "valkey": {"enabled": False, "externalSecret": "redis"},
}


def job_of(name: str) -> Manifest:
    (job,) = render(values_of(name)).all("Job")
    spec = job["spec"]
    assert isinstance(spec, dict)
    return spec


def action(spec: Manifest, status: int | None, conditions: tuple[str, ...]) -> str:
    """Return the action of Kubernetes for a failed pod: that of the first matching rule, else it counts."""
    for rule in spec["podFailurePolicy"]["rules"]:
        wanted: list[dict[str, Any]] = rule.get("onPodConditions", [])
        if any(one["type"] in conditions and one["status"] == "True" for one in wanted):
            return str(rule["action"])
        codes = rule.get("onExitCodes")
        if codes and status is not None and (status in codes["values"]) == (codes["operator"] == "In"):
            return str(rule["action"])
    return "Count"


@pytest.mark.parametrize("name", VALUES)
def test_a_failed_pod_stays_with_its_log(name: str) -> None:
    spec = job_of(name)
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["podReplacementPolicy"] == "Failed"
    assert "ttlSecondsAfterFinished" not in spec
    (container,) = spec["template"]["spec"]["containers"]
    rules = spec["podFailurePolicy"]["rules"]
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == {container["name"]}


@pytest.mark.parametrize(
    ("status", "conditions", "expected"),
    [
        (WRONG_SETTINGS, (), "FailJob"),
        (FAILED, (), "Count"),
        (137, (), "Count"),  # out of memory
        (139, (), "Count"),
        (INTERRUPTED, (), "Ignore"),  # deleted by a user
        (INTERRUPTED, ("DisruptionTarget",), "Ignore"),
        (137, ("DisruptionTarget",), "Ignore"),  # evicted, and too slow to stop
        (None, ("DisruptionTarget",), "Ignore"),  # its node was lost
        (FAILED, ("DisruptionTarget",), "Ignore"),
    ],
    ids=str,
)
def test_disruptions_do_not_count_and_wrong_settings_fail(
    status: int | None, conditions: tuple[str, ...], expected: str
) -> None:
    assert action(job_of("laptop"), status, conditions) == expected


def test_a_changed_failure_policy_makes_another_job(tmp_path: Path) -> None:
    other = tmp_path / "poise"
    shutil.copytree(CHART, other)
    template = other / "templates" / "train.yaml"
    template.write_text(template.read_text().replace("values: [130]", "values: [130, 143]"))
    values = merged(values_of("laptop"), OWN_SECRETS)
    first, second = (render(values, chart=chart).all("Job")[0] for chart in (CHART, other))
    assert first["spec"]["podFailurePolicy"] != second["spec"]["podFailurePolicy"]
    assert first["metadata"]["name"] != second["metadata"]["name"], "that of a Job that exists cannot be changed"


def test_containers_report_their_last_log_lines() -> None:
    for owner, pod in render(values_of("laptop")).pods():
        for container in pod["spec"]["containers"]:
            if owner["kind"] != "Pod":
                assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
