"""Train the runs of a comparison one after another, resume them, and write their report."""

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
from poise.local.comparison.plan import Plan, PlannedRun, make_plan, reject_changes
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
"""Service folders that a finished run no longer needs."""


def compare_runs(path: Path, *, report_only: bool, part: tuple[int, int] = (1, 1)) -> int:
    """Train the unfinished runs of compare.yaml and report, or only report; return the exit status.

    With `part` (i, n), train only every n-th run from the i-th on, so that n processes share the runs.

    Raises:
        ConfigError: a setting of any run, or the folder, cannot be used. No run has started then.
    """
    file = read_compare_file(path)
    plan = make_plan(file, path)
    reject_changes(plan)
    _log_other_runs(plan)
    console = OutputConsole()
    if report_only:
        _report(plan, console)
        return OK
    try:
        with _locked(plan.dir, part):
            return _train_all(plan, console, part)
    except KeyboardInterrupt:  # between two runs
        return INTERRUPTED


def _train_all(plan: Plan, console: Console, part: tuple[int, int]) -> int:
    _try_report(plan)
    failed = []
    index, num_parts = part
    for number, run in list(enumerate(plan.runs, 1))[index - 1 :: num_parts]:
        where = f"run {number} of {len(plan.runs)}, {run.label}"
        if _is_finished(run):
            _print(console, f"{where}: already finished")
        else:
            _print(console, f"{where}: {_progress(run)}")
            status = _train(plan, run, where, console)
            if status == OUTPUT_CLOSED:
                return status
            if status == INTERRUPTED:
                _report(plan, console)
                _print(console, "stopped; the same command resumes")
                return INTERRUPTED
            if status != OK:
                failed.append(run)
                _print(
                    console,
                    f"{where}: failed with status {status}; logs in {run.local.dir / 'logs'}{_log_tail(run)}",
                )
                continue
        if not plan.file.keep_state:
            _remove_state(run)
        if number < len(plan.runs):
            _report(plan, None)
    _report(plan, console)
    if failed:
        _print(console, f"{len(failed)} of {len(plan.runs)} runs failed: {', '.join(run.label for run in failed)}")
        _print(console, "the same command retries them")
    return FAILED if failed else OK


def _train(plan: Plan, run: PlannedRun, where: str, console: Console) -> int:
    _write_record(run, has_failed=False)
    with Follower(run.local, where, console):
        try:
            status = run_services(
                run.local, lambda: plan.reload(run).local, train=True, training_log=run.local.log("train")
            )
        except ConfigError as error:  # a problem of this machine; the other runs continue
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


def _log_tail(run: PlannedRun) -> str:
    """Return the last lines of a run's training log; empty if there is none."""
    log = run.local.log("train")
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return "".join(f"\n  {line}" for line in lines[-3:])


def _progress(run: PlannedRun) -> str:
    state = RunFolder(run.local.dir).read_state(run.local.train.run_id)
    return f"resuming after step {state.next_step}" if state.next_step else "starting"


def _remove_state(run: PlannedRun) -> None:
    for name in _STATES:
        shutil.rmtree(run.local.services_dir / name, ignore_errors=True)
    shutil.rmtree(run.local.socket.parent, ignore_errors=True)


def _report(plan: Plan, console: Console | None) -> None:
    """Write the report of all runs so far; print its tables on a console."""
    file = plan.file
    runs = tuple(ComparedRun(run.name, run.seed, run.algorithm, run.local.dir, _state(run)) for run in plan.runs)
    comparison = Comparison(file.name, file.budget.limit, file.reference_name, file.levels, runs)
    plan.dir.mkdir(parents=True, exist_ok=True)
    with (plan.dir / "report.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other parts write the same files
        tables = write_comparison(comparison, plan.dir)
    if console is not None:
        _print(console, f"\n{tables}")


def _try_report(plan: Plan) -> None:
    """Write the report before any run starts, to detect problems early. Raises `ConfigError` if that fails."""
    try:
        _report(plan, None)
    except ImportError as error:
        raise ConfigError(f"the comparison's report cannot be written: {error}. Install the missing package") from error
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


def _log_other_runs(plan: Plan) -> None:
    """Log runs in the folder that compare.yaml no longer lists."""
    planned = {run.local.dir for run in plan.runs}
    others = sorted(path.parent.name for path in plan.dir.glob("runs/*/compare.json") if path.parent not in planned)
    if others:
        logger.warning("the report leaves out runs that are no longer in compare.yaml: %s", ", ".join(others))


@contextlib.contextmanager
def _locked(folder: Path, part: tuple[int, int]) -> Iterator[None]:
    """Lock a part of the comparison. Raises `ConfigError` if another process trains any of its runs."""
    index, num_parts = part
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "compare.lock").open("ab") as whole, (folder / f"compare-{index}.lock").open("ab") as own:
        try:
            fcntl.flock(whole, (fcntl.LOCK_EX if num_parts == 1 else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process is running the comparison in {folder}. Wait for it, or stop it"
            ) from None
        yield


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
