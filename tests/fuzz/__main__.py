"""`python -m tests.fuzz`: start services, send them mutated inputs, then train on them."""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from tests.fuzz.campaign import Campaign, Problem, run_rounds
from tests.fuzz.inputs import Input, make_input
from tests.fuzz.target import Target
from tests.support.local_services import COMMAND, services_up, write_run_file

from poise.local.addresses import SERVICES
from poise.local.run_file import LocalRun, load_run

PER_ROUND = 1000
FAILURES = Path("runs/fuzz")
SETTINGS: dict[str, Any] = {
    "model": "tiny",
    "engine": "torch",
    "generation": {"default_max_tokens": 4, "shared_dirs": ["/dev/shm"]},
    "value": {"probe": {"warmup_steps": 4, "prompt_components": 16, "response_components": 16, "alpha": 30}},
    "learner": {"optimizer": {"learning_rate": 3e-4, "warmup_updates": 4}, "threads": 1},
    "train": {
        "num_steps": 3,
        "prompts_per_step": 16,
        "algorithm": {"kind": "poise", "bootstrap": "batch_mean"},
        "tasks": [{"kind": "digits"}],
        "sampling": {"max_tokens": 4},
        "evaluation": {"num_prompts": 0},
    },
}


def write_fuzz_run(folder: Path, *, has_token: bool) -> Path:
    """Write the run file of the services under test, with or without a token."""
    if not has_token:
        return write_run_file(folder, SETTINGS)
    token_file = folder / "token"
    token_file.touch(mode=0o600)
    token_file.write_text("open-sesame\n")
    auth = {"auth": {"token_file": str(token_file)}}
    return write_run_file(folder, SETTINGS | {name: {**SETTINGS.get(name, {}), **auth} for name in SERVICES})


def fuzz(run_file: Path, *, seed: int, start: int, seconds: float, replay: Input | None = None) -> Campaign:
    """Fuzz the services of a run file, then train with them. The campaign lists the problems."""
    with services_up(run_file) as run:
        campaign = asyncio.run(_campaign(run, seed, start, seconds, replay))
        _train(run_file, run, campaign)
    return campaign


async def _campaign(run: LocalRun, seed: int, start: int, seconds: float, replay: Input | None) -> Campaign:
    target = Target(run)
    try:
        campaign = Campaign(target)
        if replay is not None:
            await campaign.round([replay], in_flight=1)
            return campaign
        make = partial(make_input, seed, widths=await target.width(), tokens=target.tokens)
        await run_rounds(campaign, make, start=start, seconds=seconds, per_round=PER_ROUND, say=_say)
        return campaign
    finally:
        await target.close()


def _train(run_file: Path, run: LocalRun, campaign: Campaign) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "train", "-c", str(run_file)], capture_output=True, text=True, check=False
    )
    metrics = run.dir / "metrics.jsonl"
    num_steps = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    if done.returncode or num_steps != load_run(run_file).train.num_steps:
        campaign.problems.append(Problem(f"training afterwards failed: {done.stdout[-3000:]}{done.stderr[-3000:]}"))


def _say(text: str) -> None:
    print(text, flush=True)


def report(campaign: Campaign) -> str:
    """Return the counts of answers by RPC and status."""
    by_method: dict[str, list[str]] = defaultdict(list)
    for (method, status), count in sorted(campaign.counts.items()):
        by_method[method].append(f"{status} {count}")
    return "\n".join(f"{method:22} {', '.join(statuses)}" for method, statuses in by_method.items())


def main() -> int:
    """Run the command; return exit status 1 if there was a problem."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first input")
    parser.add_argument("--token", action="store_true", help="let the services ask for a token")
    parser.add_argument("--replay", type=Path, help="a file of a failing input")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        run_file = write_fuzz_run(Path(folder), has_token=options.token)
        replay = None if options.replay is None else Input.load(options.replay)
        campaign = fuzz(run_file, seed=options.seed, start=options.start, seconds=options.seconds, replay=replay)
    _say(report(campaign))
    for problem in campaign.problems:
        _say(f"PROBLEM {problem.what}")
        if problem.input is not None:
            path = problem.input.save(FAILURES, problem.what)
            _say(f"replay it with: python -m tests.fuzz --replay {path}")
    _say(f"{campaign.num_inputs} inputs with seed {options.seed}, {len(campaign.problems)} problems")
    return 1 if campaign.problems else 0


if __name__ == "__main__":
    sys.exit(main())
