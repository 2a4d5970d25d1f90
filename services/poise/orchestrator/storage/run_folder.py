"""The folder of a run: what is shown, what is resumed from.

    run.lock            held while the run is driven
    config.yaml         the settings
    data.json           what the data files held: hash, rows, and how many of them are used
    state.json          how far it is
    journal/            the steps in hand
    metrics.jsonl       a line a step
    values.jsonl        a line a step: predicted and realised values
    trajectories.jsonl  some groups of each step, to read
    evaluations.jsonl   a line an evaluation
    probes.json         each domain's probe, as the value service had it in the end
    memory.jsonl        a line a step: what the algorithm remembers of it
    generations/        of each evaluation all rollouts, a line each

Owns the files, but for those of the journal.
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

from poise.orchestrator.budget import Limits, Spent
from poise.orchestrator.errors import RunError, SettingsError, kind_of_error
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
"""Settings that change nothing of what a step learns."""

_LEAST_FREE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class RunState:
    """How far a run is."""

    next_step: int = 0
    wall_s: float = 0.0
    """Spent in steps so far, over all restarts, without evaluations."""
    policy_version: int = 0
    """The learner's, after the last finished step."""
    is_reported: bool = False
    """Whether the model was exported and the report written after the last step."""
    tokens: int = 0
    """Response tokens sampled for the finished steps."""

    @property
    def spent(self) -> Spent:
        """What the finished steps took."""
        return Spent(self.next_step, self.tokens, self.wall_s)

    def is_finished(self, limits: Limits) -> bool:
        """Whether nothing is left to do for a run that may spend so much."""
        return self.is_reported and limits.are_reached(self.spent)


class RunFolder:
    """One run's folder, held by one process at a time.

    What writes to an open folder raises `OSError` if it is full, not writable, or was moved. The same call may then be
    made again: it resumes where it failed. It raises `RunError` if the folder was deleted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = StepJournal(path / "journal")
        self._run_id = ""
        self._lock: IO[bytes] | None = None
        self._descriptor: int | None = None
        """Of the folder itself, wherever it is moved."""
        self._appended: set[tuple[int, str]] = set()
        """Files that hold the lines of a step which is not finished."""

    def open(self, run_id: str, settings: Mapping[str, Any]) -> RunState:
        """Take the folder and return how far the run is. Log the settings that changed since.

        Raises:
            RunError: another process drives it, it holds another run, or it cannot be written.
        """
        try:
            return self._open(run_id, settings)
        except BlockingIOError:
            self.close()
            raise RunError(f"{self.path} is being driven by another process; wait for it, or stop it") from None
        except OSError as error:
            self.close()
            raise kind_of_error(error)(
                f"{self.path} cannot be used as the run's folder: {describe_disk_error(error)}. Then run the same "
                "command again, or name another folder"
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
                "settings changed since this run began; from step %d on it follows the new ones: %s",
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
        """Return how far the run is, without taking the folder.

        Raises:
            RunError: it holds another run, or is damaged.
        """
        path = self.path / "state.json"
        if not path.exists():
            return RunState()
        try:
            values = json.loads(path.read_bytes())
            owner = values.pop("run_id")
            state = RunState(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise kind_of_error(error)(f"{path} is damaged: {error}; restore it, or use another run folder") from error
        if owner != run_id:
            raise SettingsError(f"{self.path} holds run {owner!r}, not {run_id!r}; use another folder, or that name")
        return state

    def problem(self) -> str:
        """Return why a run could not write to the folder now, without writing; empty if it could, or there is none."""
        if not self.path.exists():
            return ""
        if not os.access(self.path, os.W_OK):
            return "the run's folder cannot be written: restore the permission, or mount it writable"
        if free_bytes(self.path) < _LEAST_FREE_BYTES:
            return "the disk of the run's folder is full: training waits until there is space"
        return ""

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def check_held(self) -> None:
        """Make sure that the path still names the folder that was opened.

        Raises:
            OSError: it was moved, or another folder is there now. It may come back.
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
                f"the run's folder {self.path} was deleted while the run was driven, and with it the run's journal and "
                "metrics. Restore it from a backup and run the same command again, or start a new run"
            )
        moved = f"the run's folder {self.path} was moved" + (f" to {now_at}" if now_at else "")
        replaced = ", and another folder is there now" if self.path.exists() else ""
        raise OSError(0, f"{moved}{replaced}. Move it back to {self.path}")

    def finish_step(self, step: JournalledStep, numbers: Mapping[str, Any]) -> None:
        """Write a finished step's lines, move on, and drop its journal.

        `numbers` is its line of metrics.jsonl; `wall_s` and `tokens` in it are those of the run so far.
        """
        self.check_held()
        for name, lines in (
            ("metrics.jsonl", [numbers]),
            ("values.jsonl", [step.values] if step.values["predicted"] else []),
            ("trajectories.jsonl", step.samples),
            ("memory.jsonl", [{"step": step.step, **step.memory}]),
        ):
            if (step.step, name) not in self._appended:
                self._append(name, lines)
                self._appended.add((step.step, name))
        version, tokens = numbers["policy_version"], numbers["tokens"]
        self._write_state(RunState(step.step + 1, numbers["wall_s"], version, tokens=tokens))
        self._appended.clear()
        with contextlib.suppress(OSError):  # what is left of it is tidied up later
            self.journal.drop(step.step)

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of metrics.jsonl, one a finished step."""
        return self._lines("metrics.jsonl")

    def read_memory(self) -> list[dict[str, Any]]:
        """Return what the finished steps left to be known, in their order, and how many problems each drew."""
        num_problems = {line["step"]: line.get("num_groups") for line in self._lines("metrics.jsonl")}
        return [{"num_problems": num_problems.get(line["step"])} | line for line in self._lines("memory.jsonl")]

    def record_data(self, files: Sequence[DataFile], next_step: int) -> None:
        """Write down what data files hold, and warn of those that changed since the run began."""
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
                    "%s changed since this run began: from %s to %s. From step %d on the run follows the new rows, "
                    "and some may come again in this epoch. Restore the file, or start a run of another name",
                    name,
                    _describe_data(before[name]),
                    _describe_data(found),
                    next_step,
                )
        write_file(path, (json.dumps(now, indent=2) + "\n").encode())

    def mark_reported(self) -> None:
        """Tell that nothing is left to do after the last finished step."""
        self.check_held()
        self._write_state(replace(self.read_state(self._run_id), is_reported=True))

    def write_evaluation(self, line: Mapping[str, Any], generations: Iterable[Mapping[str, Any]]) -> None:
        """Write an evaluation's rollouts, then its line, which names their file: where it is, they are."""
        self.check_held()
        path = self._generations / f"{line['when']}-{line['step']:08d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_lines(path, generations)
        self._append("evaluations.jsonl", [dict(line) | {"generations": str(path.relative_to(self.path))}])

    def write_probes(self, report: ProbeReport) -> None:
        """Write what the value service says of its probes; what is not known is null."""
        self.check_held()
        trees = [without_nan(asdict(probe)) for probe in report.probes]
        write_file(self.path / "probes.json", (json.dumps(trees, indent=2, allow_nan=False) + "\n").encode())

    def evaluated(self, when: str, step: int) -> bool:
        """Whether an evaluation is there already."""
        self.check_held()
        return any((line["when"], line["step"]) == (when, step) for line in self._lines("evaluations.jsonl"))

    def last_evaluated(self) -> Spent:
        """Return what had been spent at the last evaluation; nothing where there is none."""
        self.check_held()
        spent = Spent()
        for line in self._lines("evaluations.jsonl"):
            spent = Spent(line["step"], line["tokens"], line["wall_s"])
        return spent

    @property
    def _generations(self) -> Path:
        return self.path / "generations"

    def _write_state(self, state: RunState) -> None:
        write_file(self.path / "state.json", json.dumps({"run_id": self._run_id} | asdict(state)).encode())

    def _read_settings(self) -> dict[str, Any]:
        try:
            values = yaml.safe_load((self.path / "config.yaml").read_bytes())
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return values if isinstance(values, dict) else {}

    def _tidy(self, next_step: int) -> None:
        """Drop what a process left halfway: lines cut off, lines of a step that is finished again, old journals."""
        names = ("metrics.jsonl", "values.jsonl", "trajectories.jsonl", "memory.jsonl", "evaluations.jsonl")
        for path in (self.path / name for name in names):
            if path.exists():
                kept = [
                    json.dumps(line, ensure_ascii=False) + "\n"
                    for line in self._lines(path.name)
                    if line["step"] < next_step or path.name == "evaluations.jsonl"
                ]
                write_file(path, "".join(kept).encode())
        told = {line.get("generations") for line in self._lines("evaluations.jsonl")}
        for path in self._generations.glob("*"):
            if str(path.relative_to(self.path)) not in told:
                path.unlink()
        self.journal.tidy(next_step)

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        path = self.path / name
        if not path.exists():
            return
        for line in path.read_bytes().split(b"\n"):  # texts hold other line ends than this one
            try:
                yield json.loads(line)
            except ValueError:
                return  # the end, or cut off by a crash

    def _append(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(map(json_line, lines))
        if text:
            append_file(self.path / name, text.encode())


def _path_of(descriptor: int) -> str:
    """Return where an open folder is now; empty if the system does not say."""
    try:
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())
    except OSError:
        return ""


def _describe_data(found: Mapping[str, Any]) -> str:
    return f"{found['num_rows']} rows, of which {found['num_used']} are used (SHA-256 {found['sha256'][:12]})"


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], section: str = "") -> Iterator[str]:
    """Yield `name: before -> now` for every setting that differs, where both are known."""
    for name in sorted((before.keys() & now.keys()) - (frozenset() if section else _FREE_TO_CHANGE)):
        if isinstance(before[name], dict) and isinstance(now[name], dict):
            yield from _changes(before[name], now[name], f"{section}{name}.")
        elif before[name] != now[name]:
            yield f"{section}{name}: {before[name]} -> {now[name]}"
