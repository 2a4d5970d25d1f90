"""`python -m poise.orchestrator.check`: check that the services work together. Uses the public SDK.

Samples from every generation replica, requests baselines for the rollouts, and compares the replicas' weights with the
learner's. Publishes no labels and trains nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import SettingsConfigDict
from rich.console import Console

from poise.orchestrator.config import EndpointsConfig
from poise.runtime.cli.broken_pipe import OutputClosed
from poise.runtime.cli.console import OutputConsole
from poise.runtime.cli.exit_status import FAILED, OK, OUTPUT_CLOSED, WRONG_SETTINGS
from poise.runtime.config.load import load_config
from poise.runtime.config.settings import ConfigError, Settings, check_readable, open_token_file
from poise.runtime.network.discovery import Discovery
from poise_client import AsyncGenerationClient, AsyncLearnerClient, AsyncValueClient, TlsOptions
from poise_client.errors import PoiseClientError
from poise_client.types import Group, LearnerStatus, Policy, Prompt, Sampling

_CALL_TIMEOUT_S = 30.0
_NUM_ROLLOUTS, _NUM_TOKENS = 2, 4


class CheckConfig(Settings):
    """Settings of the check."""

    model_config = SettingsConfigDict(env_prefix="POISE_CHECK_")

    endpoints: EndpointsConfig = EndpointsConfig()
    """Where the services are."""
    timeout_s: float = Field(300.0, gt=0)
    """How long to wait for services that are starting, s."""


class CheckFailed(Exception):
    """A service is missing, or the services disagree."""


async def check(config: CheckConfig, console: Console) -> None:
    """Check all services and print the result of each.

    Raises:
        CheckFailed, PoiseClientError: a check failed.
        TimeoutError: the checks took longer than `timeout_s`.
        ConfigError: the token file or the CA file is not readable.
    """
    endpoints = config.endpoints
    secret = open_token_file(endpoints.token_file, "endpoints.token_file")
    check_readable(endpoints.ca_file, "endpoints.ca_file")
    tls = TlsOptions(root_certs_file=endpoints.ca_file) if endpoints.ca_file else None
    options: Any = {"token_file": secret, "allow_insecure_token": True, "use_proxy": endpoints.use_proxy}
    async with asyncio.timeout(config.timeout_s):
        async with AsyncLearnerClient(endpoints.learner, tls=tls, **options) as learner:
            status = await learner.get_status(timeout_s=config.timeout_s)
        console.print(f"learner {endpoints.learner}: version {status.policy_version}, {status.state}")
        groups: list[Group] = []
        replicas = await Discovery(endpoints.generation).find()
        if not replicas:
            raise CheckFailed(f"endpoints.generation resolves to no replica: {', '.join(endpoints.generation)}")
        for found in replicas:
            address = found.target
            replica_tls = TlsOptions(endpoints.ca_file, server_name=found.server_name) if endpoints.ca_file else None
            async with AsyncGenerationClient(address, tls=replica_tls, **options) as generation:
                group = await _sample(generation, config.timeout_s)
                policy = await generation.get_policy(timeout_s=_CALL_TIMEOUT_S)
            compare(address, policy, status)
            group_id = str(len(groups))  # not the address: ids may not contain brackets
            groups.append(dataclasses.replace(group, group_id=group_id))
            console.print(
                f"generation {address}: version {policy.policy_version}, weights {policy.digest.hex()[:12]}, "
                f"sampled {sum(rollout.token_ids.size for rollout in group.rollouts)} tokens"
            )
        async with AsyncValueClient(endpoints.value, tls=tls, **options) as value:
            answers = await value.estimate_baselines(_run_id(), 0, groups)
            report = await value.get_probe(timeout_s=_CALL_TIMEOUT_S)
        probes = ", ".join(f"{probe.domain} v{probe.probe_version}" for probe in report.probes) or "none yet"
        console.print(f"value {endpoints.value}: answered {len(answers)} groups, probes: {probes}")


def _run_id() -> str:
    """Return a unique run id, which no training run uses."""
    return f"check-{uuid.uuid4().hex[:12]}"


async def _sample(client: AsyncGenerationClient, timeout_s: float) -> Group:
    groups = client.stream_trajectories(
        _run_id(),
        0,
        [Prompt("check", "1 + 1 =")],
        num_rollouts=_NUM_ROLLOUTS,
        sampling=Sampling(max_tokens=_NUM_TOKENS),
        timeout_s=timeout_s,
    )
    async for group in groups:
        if len(group.rollouts) == _NUM_ROLLOUTS and all(rollout.token_ids.size for rollout in group.rollouts):
            return group
    raise CheckFailed(f"generation {client.target} returned no complete group")


def compare(address: str, policy: Policy, status: LearnerStatus) -> None:
    """Raise `CheckFailed` if a replica has weights that the learner did not push. An older version is allowed."""
    if policy.lineage_id != status.lineage_id:
        raise CheckFailed(
            f"generation {address} serves weights that this learner did not push; add it to learner.replicas"
        )
    if policy.policy_version == status.policy_version and policy.digest != status.digest:
        raise CheckFailed(
            f"generation {address} serves version {policy.policy_version} with weights that differ from the learner's"
        )


def run_check(config: CheckConfig) -> int:
    """Check, print the result, and return the exit status."""
    console = OutputConsole(highlight=False, soft_wrap=True)
    try:
        asyncio.run(check(config, console))
    except OutputClosed:
        return OUTPUT_CLOSED
    except ConfigError as error:
        console.print(str(error))
        return WRONG_SETTINGS
    except TimeoutError:
        console.print(f"[red]failed[/red]: not all services answered within {config.timeout_s:.0f} s")
        return FAILED
    except (CheckFailed, PoiseClientError) as error:
        console.print(f"[red]failed[/red]: {error}")
        return FAILED
    console.print("[green]all checks passed[/green]")
    return OK


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the check."""
    parser = argparse.ArgumentParser(prog="python -m poise.orchestrator.check", description=__doc__)
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="settings, YAML: `endpoints`, `timeout_s`")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", dest="overrides")
    options = parser.parse_args(argv)
    try:
        config = load_config(CheckConfig, options.config, options.overrides)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return WRONG_SETTINGS
    return run_check(config)


if __name__ == "__main__":
    sys.exit(main())
