"""Pushes of low-rank adapters: which are rejected, and which files are kept while an adapter is served."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from safetensors.numpy import load_file, save_file
from tests.support.scripted_engine import PARAMETERS, ScriptedEngine

from poise.errors import BackendDown, InvalidRequest, PoiseError, VersionMismatch
from poise.generation.config import GenerationConfig
from poise.generation.metrics import GenerationMetrics
from poise.generation.weights.adapter_files import check_adapter
from poise.generation.weights.receiver import PushReceiver
from poise_client import WeightPush, weights_digest
from poise_client.types import Adapter, WeightArray
from poise_proto.v1 import generation_pb2 as pb

BASE = {name: WeightArray(np.zeros(shape, np.float32), "float32") for name, shape in PARAMETERS.items()}
ADAPTER = Adapter(rank=2, alpha=8.0, base_digest=weights_digest(BASE))
DOWN, UP = "base_model.model.first.lora_A.weight", "base_model.model.first.lora_B.weight"
Make = Callable[..., PushReceiver]


@pytest.fixture
def make_receiver(engine: ScriptedEngine, config: Callable[..., GenerationConfig], tmp_path: Path) -> Make:
    (tmp_path / "model").mkdir()
    save_file({name: weight.array for name, weight in BASE.items()}, tmp_path / "model" / "model.safetensors")

    def make(**changes: object) -> PushReceiver:
        settings = config(**{"model": str(tmp_path / "model"), "lora": {"max_rank": 4}} | changes)
        receiver = PushReceiver(engine, settings, GenerationMetrics(CollectorRegistry(), lambda: 0, lambda: 0))
        receiver.start()
        return receiver

    return make


def tensors(value: float, rank: int = 2) -> dict[str, WeightArray]:
    shapes = {DOWN: (rank, 3), UP: (2, rank)}
    return {name: WeightArray(np.full(shape, value, np.float32), "float32") for name, shape in shapes.items()}


def messages(version: int, *, adapter: Adapter | None = ADAPTER, **more: object) -> list[pb.UpdateWeightsRequest]:
    weights = tensors(version, adapter.rank if adapter else 2)
    return list(WeightPush.prepare("lineage", version, weights, adapter=adapter, **more).messages(8))  # type: ignore[arg-type]


async def push(receiver: PushReceiver, parts: list[pb.UpdateWeightsRequest]) -> None:
    async def sent():  # type: ignore[no-untyped-def]
        for part in parts:
            yield part

    await receiver.receive(sent())


@pytest.fixture
def staged(tmp_path: Path) -> Callable[[], list[Path]]:
    """Returns all files in the staging folder."""
    return lambda: sorted(path for path in (tmp_path / "staging").rglob("*") if path.is_file())


async def test_engine_gets_a_folder_as_peft_writes_it(make_receiver: Make, engine: ScriptedEngine) -> None:
    folders: list[Path] = []

    async def look(folder: Path) -> None:
        folders.append(folder)

    engine.before_update = look
    receiver = make_receiver()
    await push(receiver, messages(1))
    config = json.loads((folders[0] / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["target_modules"]) == (
        "LORA",
        2,
        8,
        ["first"],
    )
    stored = load_file(folders[0] / "adapter_model.safetensors")
    assert {name: array.tolist() for name, array in stored.items()} == {
        name: weight.array.tolist() for name, weight in tensors(1).items()
    }
    assert receiver.policy.policy_version == 1
    assert not receiver.keeps_base


async def test_folder_is_kept_while_the_adapter_is_served(
    make_receiver: Make, staged: Callable[[], list[Path]]
) -> None:
    receiver = make_receiver()
    await push(receiver, messages(1))
    first = staged()
    await push(receiver, messages(2))
    second = staged()
    assert len(first) == len(second) == 2
    assert not set(first) & set(second)
    receiver.close()
    assert staged() == []


def digest_of(weights: dict[str, WeightArray], rank: int, alpha: float, base: bytes) -> bytes:
    hashes = b"".join(hashlib.sha256(weights[name].array.tobytes()).digest() for name in sorted(weights))
    return hashlib.sha256(hashes + base + struct.pack("<I", rank) + struct.pack("<d", alpha)).digest()


async def test_digest_covers_the_adapter_and_its_base(make_receiver: Make) -> None:
    receiver = make_receiver()
    await push(receiver, messages(1))
    assert receiver.policy.digest == digest_of(tensors(1), 2, 8.0, ADAPTER.base_digest)
    other = dataclasses.replace(ADAPTER, alpha=4.0)
    assert WeightPush.prepare("l", 1, tensors(1), adapter=other).manifest.digest != receiver.policy.digest


def flip(parts: list[pb.UpdateWeightsRequest]) -> None:
    parts[1].chunk.data = bytes([parts[1].chunk.data[0] ^ 1]) + parts[1].chunk.data[1:]


def drop_a_chunk(parts: list[pb.UpdateWeightsRequest]) -> None:
    del parts[2]


def drop_the_commit(parts: list[pb.UpdateWeightsRequest]) -> None:
    del parts[-1]


def change_alpha(parts: list[pb.UpdateWeightsRequest]) -> None:
    parts[0].manifest.adapter.alpha = 16.0


def become_a_delta(parts: list[pb.UpdateWeightsRequest]) -> None:
    parts[0].manifest.base.lineage_id = "lineage"


@pytest.mark.parametrize("spoil", [flip, drop_a_chunk, drop_the_commit, change_alpha, become_a_delta])
async def test_broken_push_leaves_the_old_adapter_serving(
    make_receiver: Make,
    staged: Callable[[], list[Path]],
    spoil: Callable[[list[pb.UpdateWeightsRequest]], None],
) -> None:
    receiver = make_receiver()
    await push(receiver, messages(1))
    before = {path: path.read_bytes() for path in staged()}
    parts = messages(2)
    spoil(parts)
    with pytest.raises(InvalidRequest):
        await push(receiver, parts)
    assert receiver.policy.policy_version == 1
    assert {path: path.read_bytes() for path in staged()} == before
    await push(receiver, messages(2))
    assert receiver.policy.policy_version == 2


async def test_adapter_that_the_engine_rejects_leaves_the_old_one(
    make_receiver: Make, staged: Callable[[], list[Path]], engine: ScriptedEngine
) -> None:
    receiver = make_receiver()
    await push(receiver, messages(1))
    before = staged()

    async def fail(_: Path) -> None:
        raise BackendDown("no")

    engine.before_update = fail
    with pytest.raises(BackendDown):
        await push(receiver, messages(2))
    assert staged() == before
    assert receiver.policy.policy_version == 1


@pytest.mark.parametrize(
    ("settings", "adapter", "error", "says"),
    [
        (
            {},
            dataclasses.replace(ADAPTER, base_digest=b"\1" * 32),
            VersionMismatch,
            "model with digest 0101",
        ),
        ({}, dataclasses.replace(ADAPTER, rank=5), InvalidRequest, "required: 1 to 4"),
        ({}, dataclasses.replace(ADAPTER, rank=0), InvalidRequest, "required: 1 to 4"),
        ({}, dataclasses.replace(ADAPTER, alpha=0.0), InvalidRequest, "adapter.alpha"),
        ({}, dataclasses.replace(ADAPTER, alpha=float("inf")), InvalidRequest, "adapter.alpha"),
        ({}, None, InvalidRequest, "serves adapters only"),
        ({"lora": None}, ADAPTER, InvalidRequest, "serves the model's own parameters"),
    ],
)
async def test_push_that_the_replica_does_not_accept_is_rejected(
    make_receiver: Make, settings: dict[str, object], adapter: Adapter | None, error: type[PoiseError], says: str
) -> None:
    receiver = make_receiver(**settings)
    with pytest.raises(error, match=says):
        await push(receiver, messages(1, adapter=adapter))
    assert receiver.policy.policy_version == 0


async def test_replica_without_readable_model_files_does_not_start(make_receiver: Make, tmp_path: Path) -> None:
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(BackendDown, match="cannot be read"):
        make_receiver()
    make_receiver(lora=None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({DOWN: None}, "lora_A.weight is missing"),
        ({UP: None}, "lora_B.weight is missing"),
        ({DOWN: (3, 3)}, r"lora_A.weight has shape \[3, 3\]; required: \[2, 3\]"),
        ({"base_model.model.second.lora_A.weight": (2, 5)}, "second.lora_A.weight is not a parameter"),
        ({"base_model.model.third.lora_A.weight": (2, 5)}, "third.lora_A.weight is not a parameter"),
        ({"first.lora_A.weight": (2, 3)}, "first.lora_A.weight is not a parameter"),
        ({"base_model.model.first.lora_embedding_A": (2, 3)}, "lora_embedding_A is not a parameter"),
    ],
)
def test_adapter_that_does_not_fit_is_rejected_by_tensor(changes: dict[str, tuple[int, ...] | None], says: str) -> None:
    shapes = {DOWN: (2, 3), UP: (2, 2)}
    check_adapter(PARAMETERS, shapes, rank=2)
    with pytest.raises(InvalidRequest, match=says):
        check_adapter(PARAMETERS, {n: s for n, s in (shapes | changes).items() if s is not None}, rank=2)
