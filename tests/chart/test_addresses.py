"""The chart builds the right names of images, services and hosts."""

from __future__ import annotations

import helm_python
import pytest
from tests.chart.rendering import Manifest, merged, render, values_of

DIGEST = f"sha256:{'0' * 64}"


@pytest.mark.parametrize(
    ("images", "image"),
    [
        ({}, "poise-value:0.1.0"),
        ({"tag": "1.2"}, "poise-value:1.2"),
        ({"prefix": "registry:5000/team/"}, "registry:5000/team/poise-value:0.1.0"),
        ({"value": "registry:5000/own"}, "registry:5000/own:0.1.0"),
        ({"value": "registry:5000/own:2", "tag": "1.2"}, "registry:5000/own:2"),
        ({"digests": {"value": DIGEST}}, f"poise-value@{DIGEST}"),
        ({"value": "registry:5000/own:2", "digests": {"value": DIGEST}}, f"registry:5000/own@{DIGEST}"),
        ({"value": f"own@{DIGEST}"}, f"own@{DIGEST}"),
    ],
    ids=str,
)
def test_images_resolve_by_tag_or_digest_in_any_registry(images: Manifest, image: str) -> None:
    values = merged(values_of("laptop"), {"images": {"value": "poise-value"} | images})
    pod = render(values).one("StatefulSet", "run-poise-value")["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == image


@pytest.mark.parametrize("replicas", [0, 1, 4])
def test_replicas_are_addressed_by_their_services_name(replicas: int) -> None:
    changes = {"generation": {"replicas": replicas}}
    release = render(merged(values_of("laptop"), changes))
    name = ["dns:///run-poise-generation.rl.svc:50051"]
    assert release.config("learner")["replicas"] == name
    assert release.config("train")["endpoints"]["generation"] == name
    assert release.config("test")["endpoints"]["generation"] == name


@pytest.mark.parametrize("role", ["generation", "learner"])
def test_a_model_that_the_image_cannot_build_is_rejected(role: str) -> None:
    images = {"model": {"builtin": "smollm2-135m-instruct"}}
    assert render(merged(values_of("laptop"), images)).all("Job")
    with pytest.raises(helm_python.HelmError, match=f"set images.{role}: poise-cpu"):
        render(merged(values_of("laptop"), images | {"images": {role: f"poise-{role}"}}))


@pytest.mark.parametrize("role", ["generation", "value", "learner"])
@pytest.mark.parametrize(
    "host", ["run-poise-{}", "run-poise-{}.rl.svc", "run-poise-{0}-0.run-poise-{0}.rl.svc.cluster.local"]
)
def test_admin_api_allows_the_names_of_its_service(role: str, host: str) -> None:
    given = {role: {"config": {"admin": {"allowed_hosts": ["admin.example.com"]}}}}
    hosts = render(merged(values_of("laptop"), given)).config(role)["admin"]["allowed_hosts"]
    assert "admin.example.com" in hosts
    assert any(f".{host.format(role)}".endswith(one) for one in hosts)
    assert all(one.startswith(".run-poise-") for one in hosts if one != "admin.example.com")
