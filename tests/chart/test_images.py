"""The images contain the programs that the chart and compose.yaml run, and their sources exist."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from tests.chart.rendering import VALUES, render, values_of
from tests.support.dockerfile import instructions

from poise.generation.config import GenerationConfig
from poise.learner.config import LearnerConfig
from poise.orchestrator.config import OrchestratorConfig
from poise.runtime.config.load import load_config
from poise.runtime.config.settings import ServiceConfig
from poise.value.config import ValueConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("*.Dockerfile"))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
CONFIGS = {
    "poise.generation": GenerationConfig,
    "poise.value": ValueConfig,
    "poise.learner": LearnerConfig,
    "poise.orchestrator": OrchestratorConfig,
}


def entry_point(image: str) -> list[str]:
    """Return the Dockerfile of one of our images, by its name in compose.yaml or the chart."""
    dockerfile = DEPLOY / f"{image.removeprefix('poise-').split(':')[0]}.Dockerfile"
    (entry,) = (argument for instruction, argument in instructions(dockerfile) if instruction == "ENTRYPOINT")
    listed = json.loads(entry)
    assert isinstance(listed, list)
    return listed


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    subprocess.run([hadolint, *DOCKERFILES], check=True)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_copied_files_exist_in_the_build_context(dockerfile: Path) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for instruction, argument in instructions(dockerfile):
        if instruction == "COPY":
            for source in argument.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(fnmatch.fnmatch(source.split("/")[0], pattern) for pattern in allowed), source


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_images_run_unprivileged_and_name_real_extras(dockerfile: Path) -> None:
    steps = instructions(dockerfile)
    assert [argument for instruction, argument in steps if instruction == "USER"] == ["10001:10001"]
    last = max(index for index, (instruction, _) in enumerate(steps) if instruction == "USER")
    assert not [argument for instruction, argument in steps[last:] if instruction in ("RUN", "COPY", "ADD")]
    assert [argument for instruction, argument in steps if instruction == "HEALTHCHECK"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for _, argument in steps:
        for extra in re.findall(r"\$\{wheel\}\[(\w+)\]", argument):
            assert extra in project["optional-dependencies"]


def installs(dockerfile: Path) -> list[str]:
    """Return the pip commands of a Dockerfile."""
    runs = [argument for instruction, argument in instructions(dockerfile) if instruction == "RUN"]
    return [part.strip() for run in runs for part in run.split("&&") if "pip install" in part]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_installed_packages_have_pinned_versions(dockerfile: Path) -> None:
    steps = instructions(dockerfile)
    copied = {argument.split()[-1]: argument.split()[0] for name, argument in steps if name == "COPY"}
    defaults = dict(argument.split("=", 1) for name, argument in steps if name == "ARG")
    for command in installs(dockerfile):
        locks = re.findall(r"(?:--constraint|-r) (\S+)", command)
        for lock in locks:
            assert (ROOT / copied[lock]).is_file(), lock
        pinned = all("==" in defaults.get(name, "").split()[0] for name in re.findall(r"\$\{(TORCH)\}", command))
        is_named = re.search(r"==\d", command) or ("${TORCH}" in command and pinned)
        assert locks or is_named or "--no-deps /wheels/" in command, command


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_the_lock_covers_what_an_image_adds(dockerfile: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = re.findall(r"^([\w.-]+)==", (ROOT / "requirements" / "cpu.txt").read_text(), re.MULTILINE)
    locked = {name.lower().replace("_", "-") for name in lock} | {"torch"}  # from the base image, or TORCH
    extras = re.findall(r"\$\{wheel\}\[(\w+)\]", " ".join(installs(dockerfile)))
    wanted = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    assert {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in wanted} <= locked  # type: ignore[index]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_base_images_are_pinned(dockerfile: Path) -> None:
    bases = [argument.split()[0] for instruction, argument in instructions(dockerfile) if instruction == "FROM"]
    assert all(re.search(r":v?\d+\.\d+\.\d+", base) for base in bases), bases


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_entry_points_exist(dockerfile: Path) -> None:
    python, option, *module = entry_point(dockerfile.stem)
    assert (python, option) == ("python3", "-m")
    assert all(importlib.util.find_spec(f"{name}.__main__") for name in module)


def test_commands_of_the_chart_exist_in_their_images() -> None:
    scripts = {"poise", "hf"}  # from poise and huggingface_hub
    for name in VALUES:
        for _, pod in render(values_of(name)).pods():
            for container in (*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]):
                image = container["image"].split(":")[0]
                if image.startswith("valkey/"):
                    assert container["command"] == ["valkey-server"]
                    continue
                assert (DEPLOY / f"{image.removeprefix('poise-')}.Dockerfile").exists(), image
                if container["command"][0] == "python3":
                    assert importlib.util.find_spec(container["command"][2])
                else:
                    assert container["command"][0] in scripts


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_compose_services_accept_their_settings(name: str) -> None:
    service = COMPOSE["services"][name]
    if not service["image"].startswith("poise-") or "entrypoint" in service:
        return
    assert (DEPLOY / service["build"]["dockerfile"].removeprefix("deploy/")).exists()
    module, option, path = [*entry_point(service["image"]), *service["command"]][-3:]
    assert option == "-c"
    load_config(CONFIGS[module], DEPLOY / "compose" / path.removeprefix("/config/"))


def test_compose_services_are_read_only_and_unprivileged() -> None:
    for service in COMPOSE["services"].values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        volumes = [volume.split(":")[0] for volume in service.get("volumes", ())]
        assert all(volume in COMPOSE["volumes"] or volume.startswith("./") for volume in volumes)


def test_compose_token_belongs_to_the_user_of_the_images() -> None:
    users = {argument for path in DOCKERFILES for instruction, argument in instructions(path) if instruction == "USER"}
    (user,) = {user.split(":")[0] for user in users}
    for text in ((DEPLOY / "compose.yaml").read_text(), (DEPLOY / "README.md").read_text()):
        assert f"sudo chown {user} deploy/token && sudo chmod 400 deploy/token" in text
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"/deploy/token", "/deploy/data/"} <= set(ignored), "a secret and a data set of the user's own"


ENDS_BY_ITSELF = {"model", "train-cpu", "train"}
"""Of compose's services."""


@pytest.mark.parametrize("name", sorted(COMPOSE["services"].keys() - ENDS_BY_ITSELF))
def test_compose_services_have_health_checks(name: str) -> None:
    assert COMPOSE["services"][name]["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("name", sorted(COMPOSE["services"].keys() - ENDS_BY_ITSELF - {"valkey"}))
def test_compose_services_have_time_to_drain(name: str) -> None:
    service = COMPOSE["services"][name]
    settings = yaml.safe_load((DEPLOY / "compose" / Path(service["command"][-1]).name).read_text())
    drain_s = settings.get("drain_timeout_s", ServiceConfig.model_fields["drain_timeout_s"].default)
    assert int(service["stop_grace_period"].removesuffix("s")) >= drain_s + 30


def test_compose_keeps_downloads() -> None:
    for name in ("generation", "learner"):
        service = COMPOSE["services"][name]
        kept = [volume.split(":")[1] for volume in service["volumes"] if not volume.endswith(":ro")]
        assert any(service["environment"]["HF_HOME"].startswith(f"{folder}/") for folder in kept), name


def test_compose_queue_rejects_instead_of_evicting() -> None:
    command = COMPOSE["services"]["valkey"]["command"]
    assert command[command.index("--maxmemory") + 1] == "2gb"
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"


def test_compose_services_find_each_other() -> None:
    for profile in ("cpu", "gpu"):
        names = {
            alias
            for name, service in COMPOSE["services"].items()
            if profile in service["profiles"]
            for alias in (name, *aliases(service))
        }
        train = yaml.safe_load((DEPLOY / "compose" / f"train-{profile}.yaml").read_text())["endpoints"]
        addresses = [*train["generation"], train["value"], train["learner"]]
        assert {address.split(":")[0] for address in addresses} <= names


def aliases(service: dict[str, object]) -> list[str]:
    networks = service.get("networks", {})
    default = networks.get("default") if isinstance(networks, dict) else None
    return list((default or {}).get("aliases", ()))
