"""The folder of a run: its results, and the state from which it resumes.

run.lock            lock of the process that runs it
config.yaml         settings
data.json           data files: hash, number of rows, number of used rows
state.json          finished steps, tokens, seconds, policy version
journal/            steps between sampling and training; see `step_journal`
metrics.jsonl       one line for each step
values.jsonl        one line for each step: predicted and realised values
rollouts.jsonl      rollouts of some groups of each step, for people to read
step_states.jsonl   one line for each step: positions of the tasks, state of the algorithm
evaluations.jsonl   one line for each evaluation
generations/        all rollouts of each evaluation
probes.json         the probe of each domain at the end
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import yaml

from poise.orchestrator.budget import Limits, Usage
from poise.orchestrator.errors import RunError, SettingsError, file_error_kind
from poise.orchestrator.storage.step_journal import JournalledStep, StepJournal
from poise.orchestrator.tasks.rows import DataFile
from poise.runtime.files.atomic import (
    append_file,
    check_writable,
    describe_disk_error,
    free_bytes,
    json_line,
    without_nan,
    write_file,
    write_lines,
)
from poise_client.types import ProbeReport

logger = logging.getLogger(__name__)

_FREE_TO_CHANGE = frozenset(
    {"budget", "endpoints", "logging", "max_untrained_steps", "num_steps", "run_dir", "samples_per_step"}
)
"""Settings that do not affect training."""

_RENAMED_FILES = {"trajectories.jsonl": "rollouts.jsonl", "memory.jsonl": "step_states.jsonl"}
"""Names of files in older releases."""

_MIN_FREE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class RunState:
    """The progress of a run."""

    next_step: int = 0
    wall_s: float = 0.0
    """Seconds of training, including earlier starts of the run but not evaluations."""
    policy_version: int = 0
    """The learner's version after the last finished step."""
    is_reported: bool = False
    """Whether the model was exported and the report written after the last step."""
    tokens: int = 0
    """Response tokens sampled for the finished steps."""

    @property
    def usage(self) -> Usage:
        """Usage of the finished steps."""
        return Usage(self.next_step, self.tokens, self.wall_s)

    def is_finished(self, limits: Limits) -> bool:
        """Return whether the run has reached its limits and written its report."""
        return self.is_reported and limits.are_reached(self.usage)


class RunFolder:
    """The folder of one run, opened by one process at a time.

    Methods that write raise `OSError` if the disk is full, the folder is not writable or was moved. The call may then
    be repeated and continues at the point of failure. They raise `RunError` if the folder was deleted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = StepJournal(path / "journal")
        self._run_id = ""
        self._lock: IO[bytes] | None = None
        self._descriptor: int | None = None
        """Descriptor of the open folder, which stays valid if the folder is moved."""
        self._appended: set[tuple[int, str]] = set()
        """Files that already have the lines of a step that is being finished."""

    def open(self, run_id: str, settings: Mapping[str, Any]) -> RunState:
        """Lock the folder and return the run's progress. Log settings that changed since the last start.

        Raises:
            RunError: another process uses it, it belongs to another run, or it is not writable.
        """
        try:
            return self._open(run_id, settings)
        except BlockingIOError:
            self.close()
            raise RunError(f"another process uses {self.path}. Wait until it exits, or stop it") from None
        except OSError as error:
            self.close()
            raise file_error_kind(error)(
                f"the run folder {self.path} is not usable: {describe_disk_error(error)}. Then run the same command "
                "again, or use another folder"
            ) from error
        except BaseException:
            self.close()
            raise

    def _open(self, run_id: str, settings: Mapping[str, Any]) -> RunState:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / "run.lock").open("ab")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        state = self.read_state(run_id)
        self._run_id = run_id
        if state.next_step and (changes := list(_changes(self._read_settings(), settings))):
            logger.warning(
                "settings changed since this run began; the new ones apply from step %d on: %s",
                state.next_step,
                "; ".join(changes),
            )
        write_file(self.path / "config.yaml", yaml.safe_dump(dict(settings), sort_keys=False).encode())
        self._tidy(state.next_step)
        self.journal.open()
        self._generations.mkdir(exist_ok=True)
        check_writable(self._generations)
        return state

    def read_state(self, run_id: str) -> RunState:
        """Return the run's progress, without locking the folder.

        Raises:
            RunError: it belongs to another run, or is damaged.
        """
        path = self.path / "state.json"
        if not path.exists():
            return RunState()
        try:
            values = json.loads(path.read_bytes())
            owner = values.pop("run_id")
            state = RunState(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise file_error_kind(error)(
                f"{path} is damaged: {error}; restore it, or use another run folder"
            ) from error
        if owner != run_id:
            raise SettingsError(
                f"{self.path} belongs to run {owner!r}, not {run_id!r}; use another folder, or that name"
            )
        return state

    def problem(self) -> str:
        """Return why the folder is not writable now, without writing; empty if it is writable or does not exist."""
        if not self.path.exists():
            return ""
        if not os.access(self.path, os.W_OK):
            return "the run folder is not writable: restore the permission, or mount it writable"
        if free_bytes(self.path) < _MIN_FREE_BYTES:
            return "the disk of the run folder is full: training waits for free space"
        return ""

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def check_open(self) -> None:
        """Check that the path still names the folder that was opened.

        Raises:
            OSError: it was moved or replaced. Someone may move it back.
            RunError: it was deleted.
        """
        if self._descriptor is None:
            return
        ours = os.fstat(self._descriptor)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            there = self.path.stat()
            if (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino):
                return
        now_at = _path_of(self._descriptor)
        if now_at.endswith(" (deleted)") or not ours.st_nlink:
            raise RunError(
                f"the run folder {self.path} was deleted during the run, with the journal and the metrics. Restore it "
                "from a backup and run the same command again, or start a new run"
            )
        moved = f"the run folder {self.path} was moved" + (f" to {now_at}" if now_at else "")
        replaced = " and replaced by another folder" if self.path.exists() else ""
        raise OSError(0, f"{moved}{replaced}. Move it back to {self.path}")

    def finish_step(self, step: JournalledStep, metrics: Mapping[str, Any]) -> None:
        """Write the lines of a finished step, advance the run's state, and delete the step from the journal.

        `metrics` is its line of metrics.jsonl; its `wall_s` and `tokens` are totals of the run.
        """
        self.check_open()
        for name, lines in (
            ("metrics.jsonl", [metrics]),
            ("values.jsonl", [step.values] if step.values["predicted"] else []),
            ("rollouts.jsonl", step.rollouts),
            ("step_states.jsonl", [{"step": step.step, **step.state}]),
        ):
            if (step.step, name) not in self._appended:
                self.append_lines(name, lines)
                self._appended.add((step.step, name))
        version, tokens = metrics["policy_version"], metrics["tokens"]
        self.write_state(RunState(step.step + 1, metrics["wall_s"], version, tokens=tokens))
        self._appended.clear()
        with contextlib.suppress(OSError):  # `_tidy` deletes it at the next start
            self.journal.drop(step.step)

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of metrics.jsonl, one for each finished step."""
        return self._lines("metrics.jsonl")

    def read_step_states(self) -> list[dict[str, Any]]:
        """Return the states of the finished steps, in order, each with the number of problems that it drew."""
        num_problems = {line["step"]: line.get("num_groups") for line in self._lines("metrics.jsonl")}
        return [{"num_problems": num_problems.get(line["step"])} | line for line in self._lines("step_states.jsonl")]

    def record_data(self, files: Sequence[DataFile], next_step: int) -> None:
        """Record the data files, and warn about files that changed since the run began."""
        path = self.path / "data.json"
        if not files:
            return
        try:
            before = json.loads(path.read_bytes())
        except (OSError, ValueError):
            before = {}
        now = {
            str(file.path): {
                "sha256": file.sha256,
                "num_rows": file.num_rows,
                "num_used": len(file.problems),
                "num_bad": file.bad.num,
            }
            for file in files
        }
        for name, found in now.items():
            if next_step and isinstance(before, dict) and before.get(name, found) != found:
                logger.warning(
                    "%s changed since this run began, from %s to %s. From step %d the run uses the new rows, and may "
                    "repeat some in this epoch. Restore the file, or start a new run",
                    name,
                    _describe_data(before[name]),
                    _describe_data(found),
                    next_step,
                )
        write_file(path, (json.dumps(now, indent=2) + "\n").encode())

    def mark_reported(self) -> None:
        """Record that the report was written after the last finished step."""
        self.check_open()
        self.write_state(replace(self.read_state(self._run_id), is_reported=True))

    def write_evaluation(self, line: Mapping[str, Any], generations: Iterable[Mapping[str, Any]]) -> None:
        """Write the rollouts of an evaluation, then its line, so that a line always names a complete file."""
        self.check_open()
        path = self._generations / f"{line['when']}-{line['step']:08d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_lines(path, generations)
        self.append_lines("evaluations.jsonl", [dict(line) | {"generations": str(path.relative_to(self.path))}])

    def write_probes(self, report: ProbeReport) -> None:
        """Write the value service's report on its probes; unknown numbers become null."""
        self.check_open()
        trees = [without_nan(asdict(probe)) for probe in report.probes]
        write_file(self.path / "probes.json", (json.dumps(trees, indent=2, allow_nan=False) + "\n").encode())

    def evaluated(self, when: str, step: int) -> bool:
        """Return whether an evaluation was written."""
        self.check_open()
        return any((line["when"], line["step"]) == (when, step) for line in self._lines("evaluations.jsonl"))

    def last_evaluated(self) -> Usage:
        """Return the run's usage at the last evaluation; zero if there is none."""
        self.check_open()
        usage = Usage()
        for line in self._lines("evaluations.jsonl"):
            usage = Usage(line["step"], line["tokens"], line["wall_s"])
        return usage

    @property
    def _generations(self) -> Path:
        return self.path / "generations"

    def write_state(self, state: RunState) -> None:
        """Write state.json."""
        write_file(self.path / "state.json", json.dumps({"run_id": self._run_id} | asdict(state)).encode())

    def _read_settings(self) -> dict[str, Any]:
        try:
            values = yaml.safe_load((self.path / "config.yaml").read_bytes())
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return values if isinstance(values, dict) else {}

    def _tidy(self, next_step: int) -> None:
        """Delete incomplete lines, lines of steps that will be finished again, and old journal entries."""
        for old, new in _RENAMED_FILES.items():
            if (self.path / old).exists():
                (self.path / old).rename(self.path / new)
        names = ("metrics.jsonl", "values.jsonl", "rollouts.jsonl", "step_states.jsonl", "evaluations.jsonl")
        for path in (self.path / name for name in names):
            if path.exists():
                kept = [
                    json.dumps(line, ensure_ascii=False) + "\n"
                    for line in self._lines(path.name)
                    if line["step"] < next_step or path.name == "evaluations.jsonl"
                ]
                write_file(path, "".join(kept).encode())
        named = {line.get("generations") for line in self._lines("evaluations.jsonl")}
        for path in self._generations.glob("*"):
            if str(path.relative_to(self.path)) not in named:
                path.unlink()
        self.journal.tidy(next_step)

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        path = self.path / name
        if not path.exists():
            return
        for line in path.read_bytes().split(b"\n"):  # not splitlines: texts may contain other line separators
            try:
                yield json.loads(line)
            except ValueError:
                return  # the end, or a line cut off by a crash

    def append_lines(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append lines to a file of the folder, all or nothing."""
        text = "".join(map(json_line, lines))
        if text:
            append_file(self.path / name, text.encode())


def _path_of(descriptor: int) -> str:
    """Return the current path of an open folder; empty if unknown."""
    try:
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())
    except OSError:
        return ""


def _describe_data(found: Mapping[str, Any]) -> str:
    return f"{found['num_rows']} rows, {found['num_used']} used (SHA-256 {found['sha256'][:12]})"


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], section: str = "") -> Iterator[str]:
    """Yield `name: before -> now` for every setting that changed."""
    for name in sorted((before.keys() & now.keys()) - (frozenset() if section else _FREE_TO_CHANGE)):
        if isinstance(before[name], dict) and isinstance(now[name], dict):
            yield from _changes(before[name], now[name], f"{section}{name}.")
        elif before[name] != now[name]:
            yield f"{section}{name}: {before[name]} -> {now[name]}"
