"""When vLLM's worker makes the next weights ready, and whose turn it is to take memory for that. No vLLM runs."""

from __future__ import annotations

import logging
import os
import re
import threading
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

from poise.generation.engines.vllm.orphans import SERVER_PID_VARIABLE
from poise.generation.weights.capacity import MemoryTurn

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

DEADLINE_S = 60.0


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What loads weights in vLLM's worker, with a model that takes no memory. Files are ready at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from poise.generation.engines.vllm.weights import loader as vllm_transfer

    monkeypatch.setenv(SERVER_PID_VARIABLE, str(os.getpid()))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(vllm_transfer, "current_platform", types.SimpleNamespace(is_cpu=lambda: True))
    monkeypatch.setattr(vllm_transfer, "unknown_kinds", lambda model: [])
    monkeypatch.setattr(vllm_transfer, "num_weight_bytes", lambda model: 0)
    monkeypatch.setattr(vllm_transfer, "share_packed_heads", lambda model: None)
    monkeypatch.setattr(vllm_transfer, "_tensors", lambda path: path)
    monkeypatch.setattr(vllm_transfer, "make_next", lambda model, tensors: tensors)
    backend: Any = object.__new__(vllm_transfer.FileWeightTransferEngine)
    backend.model = None
    backend.parallel_config = types.SimpleNamespace(world_size=1)
    backend._turn = MemoryTurn()
    return backend


def test_weights_given_up_while_they_are_made_ready_do_not_replace_those_that_follow(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()

    def make_next(model: object, tensors: str) -> str:
        if tensors == "old":
            assert may_end.wait(DEADLINE_S)
        return tensors

    monkeypatch.setattr(f"{type(backend).__module__}.make_next", make_next)
    backend.prepare("old")
    old = backend._thread
    threading.Timer(0.2, may_end.set).start()
    backend.prepare("new")
    for thread in (backend._thread, old):
        thread.join(DEADLINE_S)
    assert backend._next == "new"


def test_no_other_process_takes_memory_until_that_of_the_weights_before_is_given_back(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = MemoryTurn()
    has_begun, may_end = threading.Event(), threading.Event()

    def return_freed_memory() -> None:
        has_begun.set()
        assert may_end.wait(DEADLINE_S)

    monkeypatch.setattr(f"{type(backend).__module__}.return_freed_memory", return_freed_memory)
    assert backend.prepare("new") == (logging.NOTSET, "")
    backend._thread.join(DEADLINE_S)
    assert not other.take()
    backend._next = types.SimpleNamespace(take_over=lambda: None)
    backend.start_weight_update()
    backend.receive_weights(None)
    backend.finish_weight_update()
    assert has_begun.wait(DEADLINE_S)
    assert not other.take()
    may_end.set()
    backend._thread.join(DEADLINE_S)
    assert other.take()
    other.give_back()


def test_a_failure_to_make_weights_ready_leaves_memory_to_others(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(f"{type(backend).__module__}.make_next")
    backend.prepare("new")
    backend._thread.join(DEADLINE_S)
    other = MemoryTurn()
    assert other.take()
    other.give_back()


@pytest.mark.parametrize(
    ("obstacle", "level", "reason"),
    [
        ("memory", logging.WARNING, r"takes 1250 MB.*free as much, or raise the limit"),
        ("folder", logging.WARNING, r"missing/poise-memory.*TMPDIR"),
        ("turn", logging.INFO, "another process"),
        ("ranks", logging.INFO, "several processes"),
        ("kinds", logging.INFO, r"\(Experts, Mamba\)"),
    ],
)
def test_what_is_in_the_way_is_named_and_leaves_the_turn_to_others(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str, level: int, reason: str
) -> None:
    module = type(backend).__module__
    other = MemoryTurn()
    if obstacle == "memory":
        monkeypatch.setattr(f"{module}.num_weight_bytes", lambda model: 10**9)
        monkeypatch.setattr(f"{module}.free_memory_bytes", lambda: 1.25e9 - 1)
    elif obstacle == "folder":
        monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    elif obstacle == "turn":
        assert other.take()
    elif obstacle == "ranks":
        backend.parallel_config.world_size = 2
    else:
        monkeypatch.setattr(f"{module}.unknown_kinds", lambda model: ["Experts", "Mamba"])
    told_level, told = backend.prepare("new")
    assert told_level == level
    assert re.search(reason, told)
    assert not backend.is_preparing
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert other.take()
    other.give_back()
