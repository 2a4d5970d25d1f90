"""Pushes of low-rank adapters: what is refused by name, and what is kept for as long as it is served."""

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
Receive = Callable[..., PushReceiver]


@pytest.fixture
def receiver(engine: ScriptedEngine, config: Callable[..., GenerationConfig], tmp_path: Path) -> Receive:
    (tmp_path / "model").mkdir()
    save_file({name: weight.array for name, weight in BASE.items()}, tmp_path / "model" / "model.safetensors")

    def make(**changes: object) -> PushReceiver:
        settings = config(**{"model": str(tmp_path / "model"), "lora": {"max_rank": 4}} | changes)
        pushes = PushReceiver(engine, settings, GenerationMetrics(CollectorRegistry(), lambda: 0, lambda: 0))
        pushes.start()
        return pushes

    return make


def tensors(value: float, rank: int = 2) -> dict[str, WeightArray]:
    shapes = {DOWN: (rank, 3), UP: (2, rank)}
    return {name: WeightArray(np.full(shape, value, np.float32), "float32") for name, shape in shapes.items()}


def messages(version: int, *, adapter: Adapter | None = ADAPTER, **more: object) -> list[pb.UpdateWeightsRequest]:
    weights = tensors(version, adapter.rank if adapter else 2)
    return list(WeightPush.prepare("lineage", version, weights, adapter=adapter, **more).messages(8))  # type: ignore[arg-type]


async def push(pushes: PushReceiver, parts: list[pb.UpdateWeightsRequest]) -> None:
    async def sent():  # type: ignore[no-untyped-def]
        for part in parts:
            yield part

    await pushes.take(sent())


def served(config: GenerationConfig) -> list[Path]:
    """All that lies in the staging folder."""
    return sorted(path for path in config.staging_dir.rglob("*") if path.is_file())


async def test_an_adapter_is_given_as_a_folder_of_peft_s(receiver: Receive, engine: ScriptedEngine) -> None:
    given: list[Path] = []

    async def look(folder: Path) -> None:
        given.append(folder)

    engine.before_update = look
    pushes = receiver()
    await push(pushes, messages(1))
    config = json.loads((given[0] / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["target_modules"]) == (
        "LORA",
        2,
        8,
        ["first"],
    )
    stored = load_file(given[0] / "adapter_model.safetensors")
    assert {name: array.tolist() for name, array in stored.items()} == {
        name: weight.array.tolist() for name, weight in tensors(1).items()
    }
    assert pushes.policy.policy_version == 1
    assert not pushes.keeps_base


async def test_its_folder_lives_as_long_as_it_is_served(receiver: Receive) -> None:
    pushes = receiver()
    await push(pushes, messages(1))
    first = served(pushes._config)
    await push(pushes, messages(2))
    second = served(pushes._config)
    assert len(first) == len(second) == 2
    assert not set(first) & set(second)
    pushes.close()
    assert served(pushes._config) == []


def digest_of(weights: dict[str, WeightArray], rank: int, alpha: float, base: bytes) -> bytes:
    hashes = b"".join(hashlib.sha256(weights[name].array.tobytes()).digest() for name in sorted(weights))
    return hashlib.sha256(hashes + base + struct.pack("<I", rank) + struct.pack("<d", alpha)).digest()


async def test_the_digest_is_of_the_adapter_over_its_base(receiver: Receive) -> None:
    pushes = receiver()
    await push(pushes, messages(1))
    assert pushes.policy.digest == digest_of(tensors(1), 2, 8.0, ADAPTER.base_digest)
    other = dataclasses.replace(ADAPTER, alpha=4.0)
    assert WeightPush.prepare("l", 1, tensors(1), adapter=other).manifest.digest != pushes.policy.digest


def flip(parts: list[pb.UpdateWeightsRequest]) -> None:
    parts[1].chunk.data = bytes([parts[1].chunk.data[0] ^ 1]) + parts[1].chunk.data[1:]


def drop_a_chunk(parts: list[pb.UpdateWeightsRequest]) -> None:
    del parts[2]


def drop_the_commit(parts: list[pb.UpdateWeightsRequest]) -> None:
    del parts[-1]


def say_other_alpha(parts: list[pb.UpdateWeightsRequest]) -> None:
    parts[0].manifest.adapter.alpha = 16.0


def be_a_delta(parts: list[pb.UpdateWeightsRequest]) -> None:
    parts[0].manifest.base.lineage_id = "lineage"


@pytest.mark.parametrize("spoil", [flip, drop_a_chunk, drop_the_commit, say_other_alpha, be_a_delta])
async def test_a_broken_push_leaves_the_adapter_before_serving(
    receiver: Receive, spoil: Callable[[list[pb.UpdateWeightsRequest]], None]
) -> None:
    pushes = receiver()
    await push(pushes, messages(1))
    before = {path: path.read_bytes() for path in served(pushes._config)}
    parts = messages(2)
    spoil(parts)
    with pytest.raises(InvalidRequest):
        await push(pushes, parts)
    assert pushes.policy.policy_version == 1
    assert {path: path.read_bytes() for path in served(pushes._config)} == before
    await push(pushes, messages(2))
    assert pushes.policy.policy_version == 2


async def test_an_adapter_that_the_engine_fails_on_leaves_the_one_before(
    receiver: Receive, engine: ScriptedEngine
) -> None:
    pushes = receiver()
    await push(pushes, messages(1))
    before = served(pushes._config)

    async def fail(_: Path) -> None:
        raise BackendDown("no")

    engine.before_update = fail
    with pytest.raises(BackendDown):
        await push(pushes, messages(2))
    assert served(pushes._config) == before
    assert pushes.policy.policy_version == 1


@pytest.mark.parametrize(
    ("settings", "adapter", "error", "says"),
    [
        ({}, dataclasses.replace(ADAPTER, base_digest=b"\1" * 32), VersionMismatch, "belongs to base 0101"),
        ({}, dataclasses.replace(ADAPTER, rank=5), InvalidRequest, "required: 1 to 4"),
        ({}, dataclasses.replace(ADAPTER, rank=0), InvalidRequest, "required: 1 to 4"),
        ({}, dataclasses.replace(ADAPTER, alpha=0.0), InvalidRequest, "adapter.alpha"),
        ({}, dataclasses.replace(ADAPTER, alpha=float("inf")), InvalidRequest, "adapter.alpha"),
        ({}, None, InvalidRequest, "takes adapters alone"),
        ({"lora": None}, ADAPTER, InvalidRequest, "takes whole parameters"),
    ],
)
async def test_what_a_replica_does_not_take_is_refused_by_name(
    receiver: Receive, settings: dict[str, object], adapter: Adapter | None, error: type[PoiseError], says: str
) -> None:
    pushes = receiver(**settings)
    with pytest.raises(error, match=says):
        await push(pushes, messages(1, adapter=adapter))
    assert pushes.policy.policy_version == 0


async def test_a_replica_without_readable_files_of_its_model_does_not_start(receiver: Receive, tmp_path: Path) -> None:
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(BackendDown, match="cannot be read"):
        receiver()
    receiver(lora=None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({DOWN: None}, "lora_A.weight is missing"),
        ({UP: None}, "lora_B.weight is missing"),
        ({DOWN: (3, 3)}, r"lora_A.weight has shape \[3, 3\], the model's has \[2, 3\]"),
        ({"base_model.model.second.lora_A.weight": (2, 5)}, "second.lora_A.weight is no parameter"),
        ({"base_model.model.third.lora_A.weight": (2, 5)}, "third.lora_A.weight is no parameter"),
        ({"first.lora_A.weight": (2, 3)}, "first.lora_A.weight is no parameter"),
        ({"base_model.model.first.lora_embedding_A": (2, 3)}, "lora_embedding_A is no parameter"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_tensor(
    changes: dict[str, tuple[int, ...] | None], says: str
) -> None:
    shapes = {DOWN: (2, 3), UP: (2, 2)}
    check_adapter(PARAMETERS, shapes, rank=2)
    with pytest.raises(InvalidRequest, match=says):
        check_adapter(PARAMETERS, {n: s for n, s in (shapes | changes).items() if s is not None}, rank=2)
