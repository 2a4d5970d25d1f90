"""The network policies allow the calls of the design and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from tests.chart.rendering import VALUES, Manifest, merged, render, values_of

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
"""Caller and called, with the port."""


GRPC, REDIS = [{"port": "grpc", "protocol": "TCP"}], [{"port": "redis", "protocol": "TCP"}]
ANYWHERE = [{"ipBlock": {"cidr": "0.0.0.0/0"}}, {"ipBlock": {"cidr": "::/0"}}]
DNS = {
    "to": [{"namespaceSelector": {}}],
    "ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}],
}


def rules(values: Manifest) -> tuple[dict[tuple[str, str], Any], list[tuple[str, Manifest]]]:
    """Return the allowed calls between roles with their ports, checked from both ends, and all other rules by role."""
    called: dict[tuple[str, str], Any] = {}
    calling: dict[tuple[str, str], Any] = {}
    others: list[tuple[str, Manifest]] = []
    for policy in render(values).all("NetworkPolicy"):
        role = policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
        for direction, arrows in (("ingress", called), ("egress", calling)):
            peers_of = "from" if direction == "ingress" else "to"
            for rule in policy["spec"][direction] or ():
                assert rule.get(peers_of), f"{role}: a rule without {peers_of} is open to all"
                if not components(rule[peers_of]):
                    others.append((role, rule))
                for other in components(rule[peers_of]):
                    arrows[(other, role) if direction == "ingress" else (role, other)] = rule.get("ports")
    assert called == calling
    return called, others


@pytest.mark.parametrize("name", VALUES)
def test_network_policies_allow_exactly_the_designed_calls(name: str) -> None:
    values = values_of(name)
    arrows, others = rules(values)
    expected: dict[tuple[str, str], Any] = {arrow: REDIS if arrow[1] == "valkey" else GRPC for arrow in ARROWS}
    if values["learner"].get("nodes", 1) > 1:
        expected[("learner", "learner")] = None  # NCCL chooses its own ports
    assert arrows == expected
    # Other allowed peers: DNS, the hub if a model is downloaded, and external callers.
    roles = ("generation", "value", "learner", "train", "valkey", "test")
    allowed = [(role, DNS) for role in roles]
    if values["model"].get("download"):
        hub = {"to": ANYWHERE, "ports": [{"port": 443, "protocol": "TCP"}]}
        allowed += [(role, hub) for role in ("generation", "learner")]
    if monitors := values.get("networkPolicy", {}).get("monitors"):
        scrapes = {"from": monitors, "ports": [{"port": "admin", "protocol": "TCP"}]}
        allowed += [(role, scrapes) for role in ("generation", "value", "learner")]
    assert sorted(map(str, others)) == sorted(map(str, allowed))


def test_only_the_value_service_reaches_an_external_queue() -> None:
    peers = [{"ipBlock": {"cidr": "10.1.2.3/32"}}]
    valkey = {"enabled": False, "externalSecret": "redis", "externalPort": 6380, "externalPeers": peers}
    arrows, others = rules(merged(values_of("laptop"), {"valkey": valkey}))
    assert ("value", "valkey") not in arrows
    assert [(role, rule) for role, rule in others if rule != DNS] == [
        ("value", {"to": peers, "ports": [{"port": 6380, "protocol": "TCP"}]})
    ]


def test_dns_servers_and_ports_are_configurable() -> None:
    servers = [{"namespaceSelector": {}}, {"ipBlock": {"cidr": "169.254.20.10/32"}}]
    policy = {"networkPolicy": {"dns": {"servers": servers, "ports": [53, 5353]}}}
    _, others = rules(merged(values_of("laptop"), policy))
    assert len(others) == 6
    for _, rule in others:
        assert rule["to"] == servers
        assert rule["ports"] == [
            {"port": port, "protocol": protocol} for port in (53, 5353) for protocol in ("UDP", "TCP")
        ]


def test_every_pod_has_a_network_policy() -> None:
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
