"""Preparing the next weights in vLLM's worker, and the lock on memory around it. No vLLM engine runs."""

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
from poise.generation.weights.capacity import MemoryLock

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

DEADLINE_S = 60.0


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The weight loader of vLLM's worker, with a model that needs no memory and files that load at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from poise.generation.engines.vllm import weight_loader

    monkeypatch.setenv(SERVER_PID_VARIABLE, str(os.getpid()))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(weight_loader, "current_platform", types.SimpleNamespace(is_cpu=lambda: True))
    monkeypatch.setattr(weight_loader, "unknown_layers", lambda model: [])
    monkeypatch.setattr(weight_loader, "num_weight_bytes", lambda model: 0)
    monkeypatch.setattr(weight_loader, "share_packed_heads", lambda model: None)
    monkeypatch.setattr(weight_loader, "_read_tensors", lambda path: path)
    monkeypatch.setattr(weight_loader, "prepare_next", lambda model, tensors: tensors)
    backend: Any = object.__new__(weight_loader.FileWeightTransferEngine)
    backend.model = None
    backend.parallel_config = types.SimpleNamespace(world_size=1)
    backend.memory_lock = MemoryLock()
    return backend


def test_abandoned_weights_do_not_replace_the_next_ones(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    may_end = threading.Event()

    def prepare_next(model: object, tensors: str) -> str:
        if tensors == "old":
            assert may_end.wait(DEADLINE_S)
        return tensors

    monkeypatch.setattr(f"{type(backend).__module__}.prepare_next", prepare_next)
    backend.prepare("old")
    old = backend.thread
    threading.Timer(0.2, may_end.set).start()
    backend.prepare("new")
    for thread in (backend.thread, old):
        thread.join(DEADLINE_S)
    assert backend.next_weights == "new"


def test_memory_lock_is_held_until_the_old_weights_are_freed(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = MemoryLock()
    has_begun, may_end = threading.Event(), threading.Event()

    def trim_memory() -> None:
        has_begun.set()
        assert may_end.wait(DEADLINE_S)

    monkeypatch.setattr(f"{type(backend).__module__}.trim_memory", trim_memory)
    assert backend.prepare("new") == (logging.NOTSET, "")
    backend.thread.join(DEADLINE_S)
    assert not other.try_acquire()
    backend.next_weights = types.SimpleNamespace(apply=lambda: None)
    backend.start_weight_update()
    backend.receive_weights(None)
    backend.finish_weight_update()
    assert has_begun.wait(DEADLINE_S)
    assert not other.try_acquire()
    may_end.set()
    backend.thread.join(DEADLINE_S)
    assert other.try_acquire()
    other.release()


def test_failed_preparation_releases_the_memory_lock(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(f"{type(backend).__module__}.prepare_next")
    backend.prepare("new")
    backend.thread.join(DEADLINE_S)
    other = MemoryLock()
    assert other.try_acquire()
    other.release()


@pytest.mark.parametrize(
    ("obstacle", "level", "reason"),
    [
        ("memory", logging.WARNING, r"needs 1250 MB.*raise the container's memory limit"),
        ("folder", logging.WARNING, r"missing/poise-memory.*TMPDIR"),
        ("lock", logging.INFO, "another process"),
        ("ranks", logging.INFO, "several processes"),
        ("kinds", logging.INFO, r"\(Experts, Mamba\)"),
    ],
)
def test_obstacles_are_named_and_release_the_memory_lock(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str, level: int, reason: str
) -> None:
    module = type(backend).__module__
    other = MemoryLock()
    if obstacle == "memory":
        monkeypatch.setattr(f"{module}.num_weight_bytes", lambda model: 10**9)
        monkeypatch.setattr(f"{module}.free_memory_bytes", lambda: 1.25e9 - 1)
    elif obstacle == "folder":
        monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    elif obstacle == "lock":
        assert other.try_acquire()
    elif obstacle == "ranks":
        backend.parallel_config.world_size = 2
    else:
        monkeypatch.setattr(f"{module}.unknown_layers", lambda model: ["Experts", "Mamba"])
    found_level, found = backend.prepare("new")
    assert found_level == level
    assert re.search(reason, found)
    assert not backend.is_preparing
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert other.try_acquire()
    other.release()
