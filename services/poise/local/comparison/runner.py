"""The runs of a comparison, made one after another, each as `poise run` makes one; resumed, and reported on together.

Owns their order, what is left of them and the exit status. How one is made is `up`'s.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from poise.local.comparison.file import read_compare_file
from poise.local.comparison.follower import Follower
from poise.local.comparison.plan import Plan, PlannedRun, make_plan, refuse_changes
from poise.local.up import run_services
from poise.orchestrator.errors import RunError
from poise.orchestrator.storage.run_folder import RunFolder
from poise.report.comparison import ComparedRun, Comparison, State, write_comparison
from poise.runtime.cli.console import OutputConsole
from poise.runtime.cli.exit_status import FAILED, INTERRUPTED, OK, OUTPUT_CLOSED, WRONG_SETTINGS
from poise.runtime.config.settings import ConfigError
from poise.runtime.files.atomic import describe_disk_error, write_file

logger = logging.getLogger(__name__)


_STATES = ("learner", "value", "valkey")
"""Folders of the services that only a run that goes on needs."""


def compare_runs(path: Path, *, report_only: bool) -> int:
    """Make the runs of compare.yaml that are not finished, then report; or only report. Returns the exit status.

    Raises:
        ConfigError: anything wrong with a setting of any run, or with the folder; nothing was started then.
    """
    file = read_compare_file(path)
    plan = make_plan(file, path)
    refuse_changes(plan)
    _tell_of_others(plan)
    console = OutputConsole()
    if report_only:
        _report(plan, console)
        return OK
    try:
        with _taken(plan.dir):
            return _make_all(plan, console)
    except KeyboardInterrupt:  # between two runs
        return INTERRUPTED


def _make_all(plan: Plan, console: Console) -> int:
    _try_report(plan)
    failed = []
    for number, run in enumerate(plan.runs, 1):
        where = f"run {number} of {len(plan.runs)}, {run.label}"
        if _is_finished(run):
            _say(console, f"{where}: finished before")
        else:
            _say(console, f"{where}: {_how_far(run)}")
            status = _make(plan, run, where, console)
            if status == OUTPUT_CLOSED:
                return status
            if status == INTERRUPTED:
                _report(plan, console)
                _say(console, "stopped before the end; the same command resumes")
                return INTERRUPTED
            if status != OK:
                failed.append(run)
                _say(
                    console,
                    f"{where}: failed with status {status}; its logs: {run.local.dir / 'logs'}{_last_said(run)}",
                )
                continue
        if not plan.file.keep_state:
            _drop_state(run)
        if number < len(plan.runs):
            _report(plan, None)
    _report(plan, console)
    if failed:
        _say(console, f"{len(failed)} of {len(plan.runs)} runs failed: {', '.join(run.label for run in failed)}")
        _say(console, "the same command tries them again")
    return FAILED if failed else OK


def _make(plan: Plan, run: PlannedRun, where: str, console: Console) -> int:
    _write_record(run, has_failed=False)
    with Follower(run.local, where, console):
        try:
            status = run_services(
                run.local, lambda: plan.again(run).local, train=True, training_log=run.local.log("train")
            )
        except ConfigError as error:  # what only the machine could tell: the others go on
            logger.error("%s", error)
            status = WRONG_SETTINGS
    if status not in (OK, INTERRUPTED, OUTPUT_CLOSED):
        _write_record(run, has_failed=True)
    return status


def _is_finished(run: PlannedRun) -> bool:
    try:
        state = RunFolder(run.local.dir).read_state(run.local.train.run_id)
    except RunError as error:
        raise ConfigError(str(error)) from error
    return state.is_finished(run.local.train.limits)


def _last_said(run: PlannedRun) -> str:
    """Return the end of a run's training log, where there is one."""
    log = run.local.log("train")
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return "".join(f"\n  {line}" for line in lines[-3:])


def _how_far(run: PlannedRun) -> str:
    state = RunFolder(run.local.dir).read_state(run.local.train.run_id)
    return f"resuming after step {state.next_step}" if state.next_step else "starting"


def _drop_state(run: PlannedRun) -> None:
    for name in _STATES:
        shutil.rmtree(run.local.services_dir / name, ignore_errors=True)
    shutil.rmtree(run.local.socket.parent, ignore_errors=True)


def _report(plan: Plan, console: Console | None) -> None:
    """Write the report of what there is; with a console, show its tables."""
    file = plan.file
    runs = tuple(ComparedRun(run.name, run.seed, run.algorithm, run.local.dir, _state(run)) for run in plan.runs)
    told = write_comparison(Comparison(file.name, file.budget.given, file.reference_name, file.levels, runs), plan.dir)
    if console is not None:
        _say(console, f"\n{told}")


def _try_report(plan: Plan) -> None:
    """Write the report before any run, for it is what all of them are made for. Raises `ConfigError` if that fails."""
    try:
        _report(plan, None)
    except ImportError as error:
        raise ConfigError(f"the comparison's report cannot be written: {error}. Install what is missing") from error
    except OSError as error:
        raise ConfigError(f"the comparison's report cannot be written: {describe_disk_error(error)}") from error


def _state(run: PlannedRun) -> State:
    if not run.record.exists():
        return "not begun"
    if _is_finished(run):
        return "finished"
    return "failed" if json.loads(run.record.read_text())["has_failed"] else "unfinished"


def _write_record(run: PlannedRun, *, has_failed: bool) -> None:
    run.local.dir.mkdir(parents=True, exist_ok=True)
    record = {"settings": run.settings, "has_failed": has_failed}
    write_file(run.record, (json.dumps(record, indent=2) + "\n").encode())


def _tell_of_others(plan: Plan) -> None:
    """Tell of runs that are there and no longer in the settings."""
    planned = {run.local.dir for run in plan.runs}
    others = sorted(path.parent.name for path in plan.dir.glob("runs/*/compare.json") if path.parent not in planned)
    if others:
        logger.warning("no longer among the runs, and left out of the report: %s", ", ".join(others))


@contextlib.contextmanager
def _taken(folder: Path) -> Iterator[None]:
    """Hold the comparison's folder. Raises `ConfigError` when another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "compare.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder} is being worked on by another process; wait for it, or stop it") from None
        yield


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
