"""Generation that grows and shrinks with what the learner asks for."""

from __future__ import annotations

import pytest
import yaml
from tests.chart.rendering import Manifest, merged, render, values_of


@pytest.mark.parametrize("through", ["hpa", "keda"])
def test_generation_scales_with_the_time_that_the_learner_waits(through: str) -> None:
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
    # Whoever comes later is found by name.
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
def test_an_autoscaler_that_could_not_work_is_refused(changes: Manifest, remedy: str) -> None:
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
def test_an_autoscaler_whose_metric_would_be_missing_or_mean_nothing_is_refused(changes: Manifest, remedy: str) -> None:
    scaling = {"generation": {"autoscaling": {"enabled": True}}, "monitoring": {"rules": True}}
    with pytest.raises(Exception, match=remedy):
        render(merged(merged(values_of("cluster"), scaling), changes))


def test_the_window_is_the_users_in_the_recorded_rule_and_in_the_query() -> None:
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
