"""Alerts, autoscaling and dashboards of two releases do not mix."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from tests.chart.monitoring import ALERTS, DASHBOARD, promtool
from tests.chart.rendering import Manifest, merged, render, values_of

WATCHED: Manifest = {
    "monitoring": {"rules": True, "podMonitor": True},
    "networkPolicy": {"monitors": [{"namespaceSelector": {}}]},
}
SAME_NAMESPACE, SAME_NAME = ("rl", "one", "rl", "two"), ("rl", "one", "other", "one")


def rules_of(namespace: str, release: str) -> Manifest:
    (rules,) = render(merged(values_of("laptop"), WATCHED), name=release, namespace=namespace).all("PrometheusRule")
    assert isinstance(rules["spec"], dict)
    return rules["spec"]


def fullname(release: str) -> str:
    return release if "poise" in release else f"{release}-poise"


def series(namespace: str, release: str, *, is_well: bool) -> dict[str, str]:
    """Return every metric that alerts use, of a healthy or a failing release."""
    scope = f'namespace="{namespace}", release="{release}"'
    pod = f'namespace="{namespace}", pod="{fullname(release)}-learner-0", node="{namespace}-{release}"'
    job = f'namespace="{namespace}", job_name="{fullname(release)}-train-0a1b2c3d"'
    counting, still, good, bad = "0+10x180", "50x180", "1x180", "0x180"
    return {
        f'up{{{scope}, job="poise-learner", instance="l"}}': good if is_well else bad,
        f'up{{{scope}, job="poise-value", instance="v"}}': good,
        **({f'up{{{scope}, job="poise-generation", instance="g:8051"}}': good} if is_well else {}),
        f"kube_pod_info{{{pod}}}": "1x180",
        f'kube_node_status_condition{{node="{namespace}-{release}", condition="Ready", status="true"}}': good
        if is_well
        else bad,
        f'kube_job_failed{{{job}, condition="true"}}': bad if is_well else good,
        f"kube_job_status_active{{{job}}}": "1x180",
        f'poise_learner_batches_total{{{scope}, pod="{fullname(release)}-learner-0"}}': counting if is_well else still,
        f"poise_learner_training_stopped{{{scope}}}": bad if is_well else good,
        f'poise_learner_replica_current{{{scope}, replica="g:50051"}}': good if is_well else bad,
        f'poise_generation_loaded{{{scope}, instance="g:8051"}}': "1x180",
        f"poise_value_groups_pending{{{scope}}}": "7x180",
        f"poise_value_groups_consumed_total{{{scope}}}": counting if is_well else still,
        f'poise_value_label_lag_seconds_bucket{{{scope}, domain="d", le="30"}}': counting if is_well else bad,
        f'poise_value_label_lag_seconds_bucket{{{scope}, domain="d", le="60"}}': counting,
        f'poise_value_label_lag_seconds_bucket{{{scope}, domain="d", le="+Inf"}}': counting,
        f"poise_value_dead_letters_total{{{scope}}}": still if is_well else counting,
        f"poise_value_queue_losses_total{{{scope}}}": still if is_well else counting,
        f"poise_learner_skipped_updates_total{{{scope}}}": still if is_well else counting,
        f'poise_learner_rejected_rollouts_total{{{scope}, reason="stale"}}': bad if is_well else counting,
        f"poise_learner_rollouts_total{{{scope}}}": "0+1000x180" if is_well else counting,
        f"poise_learner_train_seconds_sum{{{scope}}}": "0+40x180" if is_well else "0+1x180",
        f"poise_learner_publish_seconds_sum{{{scope}}}": "0+5x180" if is_well else "0+1x180",
        f"poise_learner_wait_seconds_sum{{{scope}}}": "0+15x180" if is_well else "0+58x180",
        f'poise_value_brier_skill{{{scope}, domain="d"}}': "0.3x180" if is_well else "-0.2x180",
        f'poise_value_window_rows{{{scope}, domain="d"}}': "3072x180",
        f'poise_value_fit_failures_total{{{scope}, domain="d"}}': still if is_well else counting,
        f"poise_learner_mismatch_kl_nats{{{scope}}}": "0.001x180" if is_well else "0.2x180",
    }


def try_rules(folder: Path, rules: Manifest, given: dict[str, str], expected: list[str]) -> None:
    """Compare the alerts that fire after 150 min with the expected ones, by promtool."""
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
    count = 'count by (alertname) (ALERTS{alertstate="firing"})'
    samples = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in expected]
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in given.items()],
        "promql_expr_test": [{"expr": count, "eval_time": "150m", "exp_samples": samples}],
    }
    suite = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [test]}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    assert "SUCCESS" in promtool("test", "rules", str(folder / "suite.yaml"))


@pytest.mark.parametrize("where", [SAME_NAMESPACE, SAME_NAME], ids=["same namespace", "same name"])
def test_alerts_of_two_releases_do_not_mix(where: tuple[str, str, str, str], tmp_path: Path) -> None:
    well, ill = where[:2], where[2:]
    given = series(*well, is_well=True) | series(*ill, is_well=False)
    alerts = [rule["alert"] for group in rules_of(*ill)["groups"] for rule in group["rules"] if "alert" in rule]
    try_rules(tmp_path, rules_of(*well), given, [])
    try_rules(tmp_path, rules_of(*ill), given, alerts)


@pytest.mark.parametrize("where", [SAME_NAMESPACE, SAME_NAME], ids=["same namespace", "same name"])
def test_plain_rules_distinguish_releases(where: tuple[str, str, str, str], tmp_path: Path) -> None:
    rules = yaml.safe_load(ALERTS.read_text())
    given = series(*where[:2], is_well=True) | series(*where[2:], is_well=False)
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule]
    alerts.remove(
        "PoiseServiceAbsent"
    )  # an absent series has no label; only the chart's rules name the expected release
    try_rules(tmp_path, rules, given, alerts)


@pytest.mark.parametrize("release", ["run", "poise", "my-poise"])
def test_every_selector_of_the_rules_names_the_release(release: str) -> None:
    text = "\n".join(str(rule) for group in rules_of("rl", release)["groups"] for rule in group["rules"])
    selectors = re.findall(r"\b((?:poise|kube)_\w+|up)(\{[^}]*\})", text)
    assert len(selectors) > 30
    for name, selector in selectors:
        if name == "kube_node_status_condition":
            continue  # nodes belong to no release; the pods on them do
        assert 'namespace="rl"' in selector, name
        if name.startswith("kube_"):
            assert f'"{fullname(release)}-' in selector, name
        else:
            assert f'release="{release}"' in selector, name
    # No metric lacks a selector.
    assert not re.findall(r"\bpoise_\w+(?![\w{])", text.replace("'record': 'poise_learner_waiting_ratio'", ""))


@pytest.mark.parametrize("through", ["hpa", "keda"])
def test_a_release_scales_by_its_own_learner(through: str) -> None:
    scaling = {"enabled": True, "through": through, "prometheusUrl": "http://prometheus:9090"}
    values = merged(merged(values_of("cluster"), WATCHED), {"generation": {"autoscaling": scaling}})
    release = render(values, name="one")
    (scaler,) = release.all("HorizontalPodAutoscaler" if through == "hpa" else "ScaledObject")
    if through == "hpa":
        selector = scaler["spec"]["metrics"][0]["external"]["metric"]["selector"]
        assert selector == {"matchLabels": {"namespace": "rl", "release": "one"}}
    else:
        query = scaler["spec"]["triggers"][0]["metadata"]["query"]
        assert query.count('{namespace="rl", release="one"}') == query.count("poise_") == 4


def test_the_monitor_labels_what_it_scrapes_with_the_release() -> None:
    (monitor,) = render(merged(values_of("laptop"), WATCHED), name="one").all("PodMonitor")
    relabelings = monitor["spec"]["podMetricsEndpoints"][0]["relabelings"]
    release = "__meta_kubernetes_pod_label_app_kubernetes_io_instance"
    assert {"sourceLabels": [release], "targetLabel": "release"} in relabelings
    # A pod that still pulls its image does not answer but is not down.
    assert {"sourceLabels": ["__meta_kubernetes_pod_phase"], "regex": "Running", "action": "keep"} in relabelings


def test_the_dashboard_shows_one_release_at_a_time() -> None:
    board = json.loads(DASHBOARD.read_text())
    assert {"namespace", "release"} <= {variable["name"] for variable in board["templating"]["list"]}
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            scoped = re.findall(r'poise_\w+\{namespace=~"\$namespace", release=~"\$release"\}', target["expr"])
            assert len(scoped) == len(re.findall(r"poise_\w+", target["expr"])), target["expr"]


def test_each_release_has_a_dashboard_that_shows_it_first() -> None:
    switch = merged(values_of("laptop"), {"monitoring": {"dashboard": True}})
    uids, files = set(), set()
    for namespace, release in (("rl", "one"), ("rl", "two"), ("other", "one")):
        boards = render(switch, name=release, namespace=namespace).all("ConfigMap")
        (board,) = (one for one in boards if one["metadata"]["name"].endswith("-dashboard"))
        ((file, text),) = board["data"].items()
        shown = json.loads(text)
        first = {variable["name"]: variable.get("current", {}).get("value") for variable in shown["templating"]["list"]}
        assert (first["namespace"], first["release"]) == (namespace, release)
        assert shown["title"] == f"POISE {namespace}/{release}"
        uids.add(shown["uid"])
        files.add(file)
    assert len(uids) == len(files) == 3
