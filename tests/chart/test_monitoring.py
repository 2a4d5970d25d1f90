"""Each alert fires when it must and only then, and has a runbook section; the chart installs alerts and dashboard."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from tests.chart.monitoring import ALERTS, DASHBOARD, ROOT, promtool
from tests.chart.rendering import Manifest, merged, render, values_of

ALL_RULES = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
RULES = [rule for rule in ALL_RULES if "alert" in rule]
METRICS = set(re.findall(r"`(poise_\w+)`", (ROOT / "docs" / "reference" / "metrics.md").read_text()))
RECORDED = {rule["record"] for rule in ALL_RULES if "record" in rule}


def test_alerts_fire_when_they_must_and_only_then() -> None:
    assert f"{len(ALL_RULES)} rules found" in promtool("check", "rules", str(ALERTS))
    assert "SUCCESS" in promtool("test", "rules", str(Path(__file__).with_name("alerts_test.yaml")))


def test_every_alert_is_tested_firing_and_silent() -> None:
    groups = yaml.safe_load(Path(__file__).with_name("alerts_test.yaml").read_text())["tests"]
    silent = {each["alertname"] for each in groups[0]["alert_rule_test"] if each["exp_alerts"] == []}
    firing = re.findall(r'alertname="(\w+)"', str(groups[1]["promql_expr_test"]))
    assert silent == set(firing) == {rule["alert"] for rule in RULES}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_has_texts_and_a_runbook_section(rule: dict[str, dict[str, str]]) -> None:
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    titles = re.findall(r"^## (\w+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert rule["alert"] in titles
    assert rule["annotations"]["summary"] and rule["annotations"]["description"]
    assert anchor == str(rule["alert"]).lower()
    assert rule["labels"]["severity"] in ("warning", "critical")


def name_of(rule: Manifest) -> str:
    return str(rule.get("alert") or rule["record"])


def rules_of(manifest: Manifest) -> list[Manifest]:
    return [rule for group in manifest["spec"]["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


@pytest.mark.parametrize("expression", [*expressions(), *(str(rule["expr"]) for rule in ALL_RULES)])
def test_expressions_use_only_existing_metrics(expression: str) -> None:
    for name in re.findall(r"\bpoise_\w+", expression):
        assert re.sub(r"_(bucket|sum|count)$", "", name) in METRICS | RECORDED, name


def test_chart_installs_alerts_and_dashboard_on_request() -> None:
    switches = {"monitoring": {"rules": True, "dashboard": True, "labels": {"release": "mine"}}}
    rendered = render(merged(values_of("laptop"), switches))
    (rules,) = rendered.all("PrometheusRule")
    assert rules["metadata"]["labels"]["release"] == "mine"
    assert [name_of(rule) for rule in rules_of(rules)] == [name_of(rule) for rule in ALL_RULES]
    (board,) = [one for one in rendered.all("ConfigMap") if one["metadata"]["name"].endswith("-dashboard")]
    (shown,) = map(json.loads, board["data"].values())
    assert shown["panels"] == json.loads(DASHBOARD.read_text())["panels"]
    plain = render(values_of("laptop"))
    assert not plain.all("PrometheusRule")
    assert not [one for one in plain.all("ConfigMap") if one["metadata"]["name"].endswith("-dashboard")]
