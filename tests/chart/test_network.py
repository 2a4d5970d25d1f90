"""The network policies allow the arrows of the design, and nothing else."""

from __future__ import annotations

import pytest
from tests.chart.rendering import VALUES, Manifest, render, values_of

ARROWS = {
    ("train", "generation"),
    ("train", "value"),
    ("train", "learner"),
    ("learner", "generation"),
    ("value", "valkey"),
    ("test", "generation"),
    ("test", "value"),
    ("test", "learner"),
}
"""Who may call whom."""


@pytest.mark.parametrize("name", VALUES)
def test_the_network_policies_allow_exactly_the_arrows_of_the_design(name: str) -> None:
    release = render(values_of(name))
    called, calling = set(), set()
    for policy in release.all("NetworkPolicy"):
        role = policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
        called |= {(other, role) for rule in policy["spec"]["ingress"] or () for other in components(rule["from"])}
        calling |= {(role, other) for rule in policy["spec"]["egress"] for other in components(rule.get("to", ()))}
    several = {("learner", "learner")} if values_of(name)["learner"].get("nodes", 1) > 1 else set()
    assert called == calling == ARROWS | several


def test_every_pod_of_the_release_is_under_a_policy() -> None:
    release = render(values_of("laptop"))
    guarded = {
        policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
        for policy in release.all("NetworkPolicy")
    }
    assert {pod["metadata"]["labels"]["app.kubernetes.io/component"] for _, pod in release.pods()} == guarded


def components(peers: list[Manifest]) -> set[str]:
    return {
        peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for peer in peers if "podSelector" in peer
    }
