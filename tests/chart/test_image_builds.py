"""Every Dockerfile's steps, executed over this machine's file system, give an image whose programs start."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from tests.chart.test_images import DOCKERFILES, ROOT, entry_point
from tests.support.dockerfile import build, can_build, stages

MODULES = {
    "cpu": (
        "poise.generation.engines.transformers.engine",
        "poise.value.app",
        "poise.learner.app",
        "poise.orchestrator.job",
    ),
    "generation": ("poise.generation.app", "poise.learner.app"),
    "learner": ("poise.learner.app",),
    "train": ("poise.orchestrator.job", "poise.orchestrator.check"),
    "value": ("poise.value.app",),
}
"""What each image is to run."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_build(), reason="only root may mount overlays and change roots"),
]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_builds_and_its_programs_start(dockerfile: Path) -> None:
    module = [*entry_point(dockerfile.stem), "poise.value"][
        :3
    ]  # the command of the image of all roles selects the role
    imports = "; ".join(f"import {name}" for name in MODULES[dockerfile.stem])
    checks = [
        shlex.join([*module, "--help"]),
        f"python3 -c {shlex.quote(imports)}",
        "python3 -c 'import poise; print(poise.__file__)'",
        "poise --version",
        "touch /models/a /state/a /runs/a",
        "! touch /a",
        "test $(id -u):$(id -g) = 10001:10001",
    ]
    done = build(dockerfile, ROOT, then="\n".join(checks))
    assert done.returncode == 0, done.stdout[-3000:]
    assert "/usr/local/lib/" in done.stdout.splitlines()[-3], "the image's own poise is not what runs"


@pytest.mark.parametrize("role", ["generation", "learner"])
def test_an_externally_managed_base_image_rejects_pip(role: str, tmp_path: Path) -> None:
    text = (ROOT / "deploy" / f"{role}.Dockerfile").read_text()
    untold = tmp_path / "untold.Dockerfile"
    untold.write_text(text.replace("PIP_BREAK_SYSTEM_PACKAGES=1", ""))
    done = build(untold, ROOT)
    assert done.returncode != 0
    assert "externally-managed-environment" in done.stdout


def test_a_step_that_fails_fails_the_build(tmp_path: Path) -> None:
    broken = tmp_path / "broken.Dockerfile"
    for step in ("COPY missing /tmp", "RUN false && true", "RUN --mount=from=a,source=/none,target=/x true"):
        broken.write_text(f"FROM python:3 AS a\nFROM python:3\n{step}\n")
        assert build(broken, ROOT).returncode != 0, step


def test_stages_are_read_as_docker_reads_them() -> None:
    wheel, image = stages(ROOT / "deploy" / "learner.Dockerfile")
    assert (wheel.name, image.base) == ("wheel", "pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime")
    assert [instruction for instruction, _ in image.steps] == [
        "COPY",
        "RUN",
        "RUN",
        "USER",
        "ENV",
        "EXPOSE",
        "HEALTHCHECK",
        "ENTRYPOINT",
    ]
