"""A verifier that fails in any way costs only its own rollout's reward, and is logged."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from poise.orchestrator.rewards.config import VerifierConfig
from poise.orchestrator.rewards.pool import VerifierPool
from poise.orchestrator.tasks.problem import Problem

VERIFIERS = """
import ctypes, os, signal, subprocess, sys, threading, time
from pathlib import Path

def good(response, answer):
    return response == answer

def hang(response, answer, *, problem):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "600"])
    Path(problem.metadata["pids"]).write_text(f"{os.getpid()} {child.pid}\\n")
    while True:
        pass

def stubborn(response, answer):
    return len(str(9 ** 9 ** 9))  # one call into C: no signal handler runs

def leave(response, answer): os._exit(3)
def leave_well(response, answer): os._exit(0)
def segfault(response, answer): ctypes.string_at(0)
def raise_(response, answer): raise KeyError("no such thing")
def sys_exit(response, answer): sys.exit(0)
def nan(response, answer): return float("nan")
def above(response, answer): return 1.5
def text(response, answer): return "1.0"
def hog(response, answer): return len(bytearray(2**40))
def grow(response, answer): return sum(map(len, [bytearray(2**24) for _ in range(10**6)]))

KEPT = []

def leak(response, answer):
    KEPT.append(bytearray(2**26))
    return 1.0

def ended(response, answer, *, finish_reason):
    return finish_reason == "length"

def talk(response, answer):
    print('{"reward": 0.125}', flush=True)
    os.write(1, b'{"reward": 0.125}\\n')
    assert sys.stdin.read() == ""
    return 1.0

def pid(response, answer, *, problem):
    Path(problem.metadata["pids"]).write_text(str(os.getpid()))
    return 1.0

def signals(response, answer):
    signal.setitimer(signal.ITIMER_REAL, 0)
    return threading.current_thread() is threading.main_thread()

def lean(response, answer):
    return not {"torch", "grpc", "numpy", "math_verify", "reasoning_gym"} & set(sys.modules)

def at_once(response, answer, *, problem):
    folder = Path(problem.metadata["folder"])
    mine = folder / str(os.getpid())
    mine.touch()
    deadline = time.monotonic() + 20
    while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    together = len(list(folder.iterdir()))
    time.sleep(0.05)
    mine.unlink()
    return together / 4
"""


@pytest.fixture
def checks(tmp_path, monkeypatch):
    """Return the import path of a verifier in the module above."""
    (tmp_path / "odd_checks.py").write_text(VERIFIERS)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])

    def problem(function, **metadata):
        return Problem("d", "p", "yes", f"odd_checks:{function}", metadata)

    return problem


def pool(**settings) -> VerifierPool:
    return VerifierPool(VerifierConfig(**{"num_workers": 1, "timeout_s": 30} | settings))


def alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


async def until(condition, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came to pass"
        await asyncio.sleep(0.02)
    return value


def read_pids(path: Path) -> list[int]:
    text = path.read_text() if path.exists() else ""
    return [int(pid) for pid in text.split()] if text.endswith("\n") else []


async def test_verifiers_reward_responses(checks):
    number = Problem("d", "p", "72", "numeric")
    async with pool(num_workers=2) as verifiers:
        problems = [checks("good"), checks("good"), number, number, Problem("d", "p", "yes", "exact")]
        verdicts = await verifiers.verify_all(problems, ["yes", "no", "#### 72", "73", "Yes."])
    assert [verdict.reward for verdict in verdicts] == [1, 0, 1, 0, 1]
    assert [verdict.error for verdict in verdicts] == [None] * 5
    assert all(0 < verdict.seconds < 30 for verdict in verdicts)
    assert not verifiers.num_failures


@pytest.mark.parametrize(
    ("function", "cause", "said"),
    [
        ("leave", "crash", "its process exited with status 3"),
        ("leave_well", "crash", "its process exited with status 0"),
        ("segfault", "crash", "its process was killed by SIGSEGV"),
        ("raise_", "raised", "KeyError: 'no such thing'"),
        ("sys_exit", "raised", "SystemExit: 0"),
        ("nan", "raised", "returned nan; must return a number in [0, 1]"),
        ("above", "raised", "returned 1.5; must return a number in [0, 1]"),
        ("text", "raised", "returned '1.0'; must return a number in [0, 1], or a bool"),
        ("missing", "raised", "module odd_checks has no missing"),
    ],
)
async def test_a_failing_verifier_costs_only_its_rollout(checks, caplog, function, cause, said):
    caplog.set_level(logging.WARNING)
    async with pool() as verifiers:
        verdict = await verifiers.verify(checks(function), "yes")
        after = await verifiers.verify(checks("good"), "yes")
    assert verdict.reward == 0
    assert said in verdict.error
    assert (after.reward, after.error) == (1, None)
    assert verifiers.num_failures == {cause: 1}
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert checks(function).key[:16] in record.message
    assert said in record.message


@pytest.mark.parametrize("function", ["hog", "grow"])
async def test_running_out_of_memory_costs_only_one_rollout(checks, function):
    async with pool(max_memory_bytes=2**28, timeout_s=300) as verifiers:
        verdict = await verifiers.verify(checks(function), "yes")
        after = await verifiers.verify(checks("good"), "yes")
    assert verdict.reward == 0
    assert verdict.error == "exceeded verifier.max_memory_bytes = 268435456 and was killed"
    assert after.reward == 1
    assert verifiers.num_failures == {"memory": 1}


async def test_memory_leaked_by_earlier_checks_is_harmless(checks):
    async with pool(max_memory_bytes=2**28) as verifiers:
        verdicts = [await verifiers.verify(checks("leak"), "yes") for _ in range(12)]
    assert [verdict.reward for verdict in verdicts] == [1] * 12
    assert not verifiers.num_failures


async def test_verifiers_get_the_finish_reason(checks):
    async with pool() as verifiers:
        assert (await verifiers.verify(checks("ended"), "yes", "length")).reward == 1
        assert (await verifiers.verify(checks("ended"), "yes", "stop")).reward == 0


async def test_built_in_verifiers_return_a_reason(checks):
    async with pool() as verifiers:
        verdict = await verifiers.verify(Problem("d", "p", 72, "numeric"), "#### 73")
    assert verdict.reason == "the response gives 73, the answer is 72"


async def test_a_hanging_verifier_is_killed_with_its_children(checks, tmp_path, caplog):
    pids_file = tmp_path / "pids"
    async with pool(timeout_s=1.0) as verifiers:
        verdict = await verifiers.verify(checks("hang", pids=str(pids_file)), "yes")
        after = await verifiers.verify(checks("good"), "yes")
    assert (verdict.reward, verdict.error) == (0, "did not finish within 1 s and was killed")
    assert after.reward == 1
    assert verifiers.num_failures == {"timeout": 1}
    assert len(read_pids(pids_file)) == 2
    await until(lambda: not any(alive(pid) for pid in read_pids(pids_file)))


async def test_a_check_that_hangs_in_c_is_killed(checks):
    async with pool(timeout_s=0.5) as verifiers:
        verdict = await verifiers.verify(checks("stubborn"), "yes")
    assert "did not finish" in verdict.error
    assert verdict.seconds < 20


async def test_a_hanging_verifier_blocks_no_other_worker(checks, tmp_path):
    async with pool(num_workers=2) as verifiers:
        hanging = asyncio.create_task(verifiers.verify(checks("hang", pids=str(tmp_path / "pids")), "yes"))
        await until(lambda: read_pids(tmp_path / "pids"))
        verdicts = await verifiers.verify_all([checks("good")] * 20, ["yes"] * 20)
        assert not hanging.done()
        hanging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hanging
    assert [verdict.reward for verdict in verdicts] == [1] * 20


async def test_a_cancelled_check_frees_its_worker(checks, tmp_path):
    pids_file = tmp_path / "pids"
    async with pool() as verifiers:
        hanging = asyncio.create_task(verifiers.verify(checks("hang", pids=str(pids_file)), "yes"))
        waiting = asyncio.create_task(verifiers.verify(checks("good"), "yes"))
        given_up = asyncio.create_task(verifiers.verify(checks("good"), "yes"))
        pids = await until(lambda: read_pids(pids_file))
        given_up.cancel()
        hanging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hanging
        assert (await waiting).reward == 1
        with pytest.raises(asyncio.CancelledError):
            await given_up
        assert (await verifiers.verify(checks("good"), "yes")).reward == 1
    await until(lambda: not any(alive(pid) for pid in pids))
    assert not verifiers.num_failures


async def test_every_worker_runs_a_check_at_a_time(checks, tmp_path):
    folder = tmp_path / "running"
    folder.mkdir()
    async with pool(num_workers=2) as verifiers:
        verdicts = await verifiers.verify_all([checks("at_once", folder=str(folder))] * 6, ["yes"] * 6)
    assert {verdict.reward for verdict in verdicts} == {0.5}  # two of four


async def test_the_time_limit_excludes_imports(checks, tmp_path):
    (tmp_path / "slow_import.py").write_text("import time\ntime.sleep(1.5)\ndef good(r, a): return True")
    async with pool(timeout_s=1.0) as verifiers:
        verdict = await verifiers.verify(Problem("d", "p", "yes", "slow_import:good"), "yes")
    assert verdict.error is None


async def test_verifier_may_print_and_read(checks):
    async with pool() as verifiers:
        assert (await verifiers.verify(checks("talk"), "yes")).reward == 1
        assert (await verifiers.verify(checks("good"), "yes")).reward == 1


async def test_checks_run_in_the_main_thread_of_a_lean_process(checks):
    async with pool() as verifiers:
        assert (await verifiers.verify(checks("signals"), "yes")).reward == 1
        assert (await verifiers.verify(checks("lean"), "yes")).reward == 1


async def test_a_killed_idle_process_is_replaced(checks, tmp_path):
    async with pool() as verifiers:
        await verifiers.verify(checks("pid", pids=str(tmp_path / "pid")), "yes")
        pid = int((tmp_path / "pid").read_text())
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not alive(pid))
        verdict = await verifiers.verify(checks("good"), "yes")
    assert (verdict.reward, verdict.error) == (1, None)


async def test_a_process_is_reused_between_checks(checks, tmp_path):
    pids = []
    async with pool() as verifiers:
        for _ in range(2):
            await verifiers.verify(checks("pid", pids=str(tmp_path / "pid")), "yes")
            await verifiers.verify(checks("raise_"), "yes")
            pids.append((tmp_path / "pid").read_text())
    assert pids[0] == pids[1]


async def test_a_response_that_is_too_long_gets_reward_0(checks):
    async with pool(max_response_chars=3) as verifiers:
        verdict = await verifiers.verify(checks("good"), "yess")
        assert (await verifiers.verify(checks("good"), "yes")).reward == 1
    assert verdict.error == "the response has 4 characters; verifier.max_response_chars is 3"
    assert verifiers.num_failures == {"too_long": 1}


async def test_any_text_reaches_the_verifier_unchanged(checks):
    odd = 'line\nbreak\r "quotes" \x00 \u2028 ß 😀 \ud800'
    async with pool() as verifiers:
        verdict = await verifiers.verify(Problem("d", "p", odd, "odd_checks:good"), odd)
    assert verdict.reward == 1


async def test_stopping_fails_running_and_waiting_checks(checks, tmp_path):
    verifiers = pool()
    await verifiers.start()
    hanging = asyncio.create_task(verifiers.verify(checks("hang", pids=str(tmp_path / "pids")), "yes"))
    waiting = asyncio.create_task(verifiers.verify(checks("good"), "yes"))
    pids = await until(lambda: read_pids(tmp_path / "pids"))
    await verifiers.stop()
    assert "SIGKILL" in (await hanging).error
    assert (await waiting).error == "the verifier pool was stopped"
    await until(lambda: not any(alive(pid) for pid in pids))
    with pytest.raises(RuntimeError, match="the verifier pool is not running"):
        await verifiers.verify(checks("good"), "yes")


async def test_a_process_that_cannot_start_gives_reward_0(checks, monkeypatch):
    async with pool() as verifiers:
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        verdict = await verifiers.verify(checks("good"), "yes")
        assert "starting a process failed" in verdict.error
        monkeypatch.undo()
        assert (await verifiers.verify(Problem("d", "p", "yes", "exact"), "yes")).reward == 1


async def test_a_hanging_check_exits_with_a_killed_run(checks, tmp_path):
    code = (
        "import asyncio, sys\n"
        "from poise.orchestrator.tasks.problem import Problem\n"
        "from poise.orchestrator.rewards.config import VerifierConfig\n"
        "from poise.orchestrator.rewards.pool import VerifierPool\n"
        "async def main():\n"
        "    async with VerifierPool(VerifierConfig(timeout_s=600)) as verifiers:\n"
        f"        problem = Problem('d', 'p', 'a', 'odd_checks:hang', {{'pids': {str(tmp_path / 'pids')!r}}})\n"
        "        await verifiers.verify(problem, 'yes')\n"
        "asyncio.run(main())"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.Popen([sys.executable, "-c", code], env=environment)
    worker, child = await until(lambda: read_pids(tmp_path / "pids"))
    try:
        run.kill()
        run.wait()
        await until(lambda: not alive(worker))
    finally:
        for pid in (worker, child):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
