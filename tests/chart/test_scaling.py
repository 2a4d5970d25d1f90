"""Generation scales with the time that the learner waits."""

from __future__ import annotations

import pytest
import yaml
from tests.chart.rendering import Manifest, merged, render, values_of


@pytest.mark.parametrize("through", ["hpa", "keda"])
def test_generation_scales_with_the_learners_waiting_time(through: str) -> None:
    scaling = {"enabled": True, "through": through, "prometheusUrl": "http://prometheus:9090", "maxReplicas": 5}
    values = merged(values_of("cluster"), {"generation": {"autoscaling": scaling}, "monitoring": {"rules": True}})
    release = render(values)
    generation = release.one("StatefulSet", "run-poise-generation")
    assert "replicas" not in generation["spec"], "the chart would undo what the autoscaler did"
    (scaler,) = release.all("HorizontalPodAutoscaler" if through == "hpa" else "ScaledObject")
    assert scaler["spec"]["scaleTargetRef"]["name"] == generation["metadata"]["name"]
    text = yaml.safe_dump(scaler)
    assert "stabilizationWindowSeconds: 900" in text
    assert ("value: 200m" in text) if through == "hpa" else ("threshold: '0.2'" in text)
    # Later replicas are found by name.
    name = ["dns:///run-poise-generation.rl.svc:50051"]
    assert release.config("learner")["replicas"] == release.config("train")["endpoints"]["generation"] == name


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"maxReplicas": 1, "minReplicas": 2}, "maxReplicas is below minReplicas"),
        ({"through": "keda"}, "set generation.autoscaling.prometheusUrl"),
        ({}, "set monitoring.rules"),
    ],
)
def test_an_autoscaler_that_cannot_work_is_rejected(changes: Manifest, remedy: str) -> None:
    scaling = {"generation": {"autoscaling": {"enabled": True} | changes}}
    with pytest.raises(Exception, match=remedy):
        render(merged(values_of("cluster"), scaling))


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"monitoring": {"podMonitor": False}}, "set monitoring.podMonitor"),
        ({"train": {"config": {"max_staleness": 0}}}, "train.config.max_staleness above 0"),
        ({"train": {"config": {"max_staleness": 2}}}, "above learner.config.max_staleness"),
        ({"networkPolicy": {"monitors": []}}, "networkPolicy.monitors"),
    ],
    ids=str,
)
def test_an_autoscaler_without_a_useful_metric_is_rejected(changes: Manifest, remedy: str) -> None:
    scaling = {"generation": {"autoscaling": {"enabled": True}}, "monitoring": {"rules": True}}
    with pytest.raises(Exception, match=remedy):
        render(merged(merged(values_of("cluster"), scaling), changes))


def test_rule_and_query_use_the_configured_window() -> None:
    scaling = {"enabled": True, "windowMinutes": 75}
    values = merged(values_of("cluster"), {"generation": {"autoscaling": scaling}, "monitoring": {"rules": True}})
    (rules,) = render(values).all("PrometheusRule")
    recorded = rules["spec"]["groups"][0]["rules"][0]["expr"]
    assert recorded.count("[75m]") == 4 and "[30m]" not in str(rules)
    keda = {"generation": {"autoscaling": {"through": "keda", "prometheusUrl": "http://prometheus:9090"}}}
    (scaler,) = render(merged(values, keda)).all("ScaledObject")
    metadata = scaler["spec"]["triggers"][0]["metadata"]
    assert metadata["query"].count('{namespace="rl", release="run"}[75m]') == 4
    assert metadata["ignoreNullValues"] == "false"
