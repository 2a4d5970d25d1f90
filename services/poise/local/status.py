"""`poise status`: the state of each service, and the progress of the run."""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from poise.local.addresses import SERVICES
from poise.local.admin_client import call_admin
from poise.local.processes.supervisor import process_state
from poise.local.run_file import LocalRun
from poise.orchestrator.errors import RunError
from poise.orchestrator.storage.run_folder import RunFolder
from poise.runtime.config.settings import AuthConfig, ConfigError
from poise.runtime.startup import without_elapsed

_TIMEOUT_S = 3.0


def show_status(run: LocalRun, as_json: bool) -> int:
    """Print the state of all services and of the run; return 0 if all services are ready, else 1.

    Raises:
        ConfigError: the run's folder, or a token file, cannot be read.
    """
    services = {name: _read_status(run, name) for name in SERVICES}
    folder = RunFolder(run.dir)
    try:
        state, problem = folder.read_state(run.train.run_id), folder.problem()
    except RunError as error:
        raise ConfigError(str(error)) from error
    if as_json:
        print(json.dumps({"run": asdict(state) | {"problem": problem}, "services": services}, indent=2))
    else:
        finished = ", finished" if state.is_finished(run.train.limits) else ""
        print(f"run {run.name}: {run.train.limits.describe(state.usage)}{finished}, folder {run.dir}")
        if problem:
            print(f"  {problem}")
        for name, facts in services.items():
            print(f"{name:11} gRPC {run.grpc_address(name):16} admin {run.admin_address(name):16} {_line(name, facts)}")
            for replica in facts.get("replicas", ()):
                print(f"  replica   {replica['address']:21} {_replica_line(replica)}")
            if probes := facts.get("probes"):
                print("\n".join([_PROBE_HEADER, *map(_probe_line, probes)]))
        if run.train.endpoints.token_file is not None:
            print(f"token for your own clients: export POISE_TOKEN_FILE={run.train.endpoints.token_file}")
    return 0 if all(facts.get("ready") for facts in services.values()) else 1


def push_problems(run: LocalRun) -> str:
    """Return why the learner's weights do not reach replicas; empty if there is no known problem. Blocks for seconds.

    Raises:
        ConfigError: the learner's token file cannot be read.
    """
    replicas = _read_status(run, "learner").get("replicas", ())
    errors = {one["address"]: one["error"] for one in replicas}
    # An error with a duration is the progress of a starting replica, which is logged for that replica.
    problems = {address: error for address, error in errors.items() if error and error == without_elapsed(error)}
    return "; ".join(f"pushing to {address}: {error}" for address, error in problems.items())


def _read_status(run: LocalRun, name: str) -> dict[str, Any]:
    auth: AuthConfig = getattr(run, name).auth
    token = auth.read_token()
    url = f"http://{run.admin_address(name)}"
    reason = f"another program listens at {url}. Stop it"
    try:
        facts = call_admin(url, token, "/status", timeout_s=_TIMEOUT_S)
        if isinstance(facts, dict) and "ready" in facts:
            return facts
    except urllib.error.HTTPError as error:
        reason = f"the admin app rejected the request: {error}"
    except OSError:
        reason = process_state(run.services_dir, name, run.log(name))
    except ValueError:
        pass
    return {"ready": False, "reason": reason}


def _line(name: str, facts: dict[str, Any]) -> str:
    if not facts["ready"]:
        return f"not ready: {facts['reason']}"
    if name == "generation":
        running = f"{facts['num_running']} rollouts running"
        return f"ready, policy version {facts['policy_version']}{_digest(facts['digest'])}, {running}"
    if name == "learner":
        current = sum(replica["current"] for replica in facts["replicas"])
        replicas = f"{current} of {len(facts['replicas'])} replicas up to date"
        return f"{facts['state']}, policy version {facts['policy_version']}{_digest(facts['digest'])}, {replicas}"
    waiting = f", {facts['num_pending']} waiting" if facts["num_pending"] else ""
    dead = f", {facts['num_dead_letters']} dead letters (see `poise queue`)" if facts["num_dead_letters"] else ""
    return f"{facts['state']}, {facts['num_groups_consumed']} groups consumed{waiting}{dead}, {_count(facts['probes'])}"


def _count(probes: list[dict[str, Any]]) -> str:
    fitted = sum(probe["probe_version"] > 0 for probe in probes)
    return f"{fitted} of {len(probes)} domains have a fitted estimator"


_PROBE_HEADER = (
    f"  {'domain':20} {'version':>7} {'rows':>6} {'steps':>7} {'r':>6} {'brier':>6} {'skill':>6} {'bias':>7} "
    f"{'clipped':>7} {'/none':>6} {'/rloo':>6} {'/batch':>6} {'lag':>8} {'fit':>8}"
)
"""r, brier, skill and bias compare a probe's values with the siblings' rewards, others' with the rollout's own. /none,
/rloo and /batch are the mean squared advantage relative to other baselines; for score-weighted estimators, weighted by
squared score norms. lag is the time from publishing a label until it is durable. A second line groups rollouts by
tenths of the value; each tenth has its mean value and mean reward. A third line names an estimator other than the
probe, and the errors of those that were compared."""


def _probe_line(probe: dict[str, Any]) -> str:
    quality = probe["quality"]
    steps = f"{probe['num_steps_seen']}/{probe['warmup_steps']}"
    return (
        f"  {probe['domain']:20} {probe['probe_version']:>7} {probe['num_rows']:>6} {steps:>7} "
        f"{_number(quality['pearson']):>6} {_number(quality['brier'], '.3f'):>6} "
        f"{_number(quality['brier_skill']):>6} {_number(quality['bias'], '+.3f'):>7} "
        f"{_number(quality['share_clipped']):>7} {_variance_ratios(quality)} "
        f"{_number(probe['label_lag_s'], '.2f', ' s'):>8} {_number(probe['last_fit_s'], '.3f', ' s'):>8}"
        f"{_calibration(quality['calibration'])}{_estimator(probe)}"
    )


def _variance_ratios(quality: Mapping[str, Any]) -> str:
    """Return the cells /none, /rloo and /batch: weighted if the estimator is score-weighted, which has no /rloo."""
    if (weighted := quality.get("weighted_variance_vs_none")) is not None:
        ratios = (weighted, None, quality["weighted_variance_vs_batch_mean"])
    else:
        ratios = (quality["variance_vs_none"], quality["variance_vs_rloo"], quality["variance_vs_batch_mean"])
    return " ".join(f"{_number(ratio):>6}" for ratio in ratios)


def _estimator(probe: dict[str, Any]) -> str:
    """Return a line about a domain's estimator; empty for the probe."""
    configured, current = probe.get("configured", "probe"), probe.get("estimator")
    if configured == "probe":
        return ""
    errors = ", ".join(f"{one['estimator']} {one['weighted_error']:.4f}" for one in probe.get("errors", ()))
    chosen = f" chose {current}" if configured == "auto" and current else ""
    return f"\n    estimator {configured}{chosen}{f'; weighted errors {errors}' if errors else ''}"


def _calibration(bins: Sequence[Mapping[str, float]]) -> str:
    pairs = " ".join(f"{one['predicted']:.2f}→{one['realised']:.2f}" for one in bins)
    return f"\n    calibration {pairs}" if pairs else ""


def _number(value: float | None, form: str = ".2f", unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def _replica_line(replica: dict[str, Any]) -> str:
    served = f"serves version {replica['policy_version']}{_digest(replica['digest'])}"
    return f"{served}, {'up to date' if replica['current'] else replica['error'] or 'catching up'}"


def _digest(digest: str) -> str:
    """Return the first digits of a weights digest in brackets; empty before the first push."""
    return f" ({digest[:8]})" if digest else ""
