"""Inputs that could freeze the generation service or crash it are rejected."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import transformers
from tests.integration.generation.conftest import Reference, Running
from tests.support.tiny_models import make_tiny_llama

from poise_client import combine_digests
from poise_proto.v1 import common_pb2
from poise_proto.v1 import generation_pb2 as pb

MANY_AXES = [2] * 500_000
SLOW_TEMPLATE = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
async def tiny(serve: Callable[..., Any], reference: Reference, tmp_path: Path) -> Running:
    running: Running = await serve(model=str(reference.folder), default_max_tokens=4, shared_dirs=(tmp_path,))
    return running


def begin(**changes: Any) -> pb.UpdateWeightsRequest:
    fields: dict[str, Any] = {"lineage_id": "l", "policy_version": 1, "digest": bytes(32)} | changes
    return pb.UpdateWeightsRequest(manifest=pb.WeightsManifest(**fields))


def tensor(**changes: Any) -> pb.WeightTensor:
    fields: dict[str, Any] = {"name": "a", "dtype": common_pb2.DTYPE_FLOAT32, "shape": [2], "sha256": bytes(32)}
    return pb.WeightTensor(**fields | changes)


def prompts(*specs: pb.PromptSpec, **more: Any) -> pb.StreamTrajectoriesRequest:
    return pb.StreamTrajectoriesRequest(run_id="r", prompts=specs, **more)


def chat(*contents: str, role: int = pb.CHAT_ROLE_USER) -> pb.PromptSpec:
    turns = [pb.ChatMessage(role=role, content=content) for content in contents]
    return pb.PromptSpec(group_id="g", chat=pb.ChatPrompt(messages=turns))


PUSHES = {
    "axes": begin(tensors=[tensor(shape=MANY_AXES)]),
    "large axes": begin(tensors=[tensor(shape=[2**32 - 1] * 5000)]),
    "axes of a delta": begin(
        tensors=[tensor(shape=MANY_AXES)], base=pb.WeightsBase(lineage_id="l", policy_version=1, digest=bytes(32))
    ),
    "many tensors": begin(tensors=[tensor()] * 70_000),
    "empty tensors": begin(tensors=[pb.WeightTensor()] * 1_000_000),
    "file with zero byte": begin(tensors=[tensor()], file="/tmp/a\0b"),
    "file with a long name": begin(tensors=[tensor()], file="/" + "x" * 2000),
    "file with a long path": begin(tensors=[tensor()], file="/x" * 100_000),
    "long lineage": begin(lineage_id="l" * 1_000_000, tensors=[tensor()]),
    "long name": begin(tensors=[tensor(name="n" * 1_000_000)]),
    "unknown backend": begin(tensors=[tensor()], process_group=pb.ProcessGroup(backend=77, timeout_s=1)),
    "nan timeout": begin(
        tensors=[tensor()], process_group=pb.ProcessGroup(backend="PROCESS_GROUP_BACKEND_GLOO", timeout_s=float("nan"))
    ),
}

SAMPLES = {
    "long text": prompts(pb.PromptSpec(group_id="g", text="a b " * 900_000)),
    "long word": prompts(pb.PromptSpec(group_id="g", text="a" * 3_900_000)),
    "zero bytes": prompts(pb.PromptSpec(group_id="g", text="\0" * 3_900_000)),
    "many tokens": prompts(pb.PromptSpec(group_id="g", tokens=pb.TokenPrompt(token_ids=[0] * 4_000_000))),
    "large tokens": prompts(pb.PromptSpec(group_id="g", tokens=pb.TokenPrompt(token_ids=[2**32 - 1]))),
    "long chat": prompts(chat("x" * 3_900_000)),
    "many turns": prompts(pb.PromptSpec(group_id="g", chat=pb.ChatPrompt(messages=[pb.ChatMessage()] * 2_000_000))),
    "wrong roles": prompts(chat(*["x"] * 30_000, role=77)),
    "many prompts": prompts(*[pb.PromptSpec()] * 2_000_000),
    "long group": prompts(pb.PromptSpec(group_id="g" * 3_900_000, text="x")),
    "same groups": prompts(*[pb.PromptSpec(group_id="x" * 1000, text="x")] * 3000),
    "many stops": prompts(chat("x"), sampling=pb.SamplingParams(stop=[""] * 2_000_000)),
    "nan temperature": prompts(chat("x"), sampling=pb.SamplingParams(temperature=float("nan"))),
}


async def status_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def first_group(running: Running, request: pb.StreamTrajectoriesRequest) -> Any:
    return await running.stub.StreamTrajectories(request).read()


@pytest.mark.parametrize("how", PUSHES)
async def test_push_of_impossible_size_is_rejected(tiny: Running, how: str) -> None:
    error = await status_of(tiny.stub.UpdateWeights(iter([PUSHES[how]])))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(error.details() or "") <= 600
    assert tiny.staged() == []
    assert (await tiny.client.get_policy()).policy_version == 0


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["ä" * 100] * 30), "..", ".", "/", "none"])
async def test_impossible_file_is_rejected(tiny: Running, tmp_path: Path, name: str) -> None:
    one = tensor(sha256=hashlib.sha256(bytes(8)).digest())
    digest = combine_digests({"a": one.sha256})
    error = await status_of(
        tiny.stub.UpdateWeights(iter([begin(tensors=[one], digest=digest, file=f"{tmp_path}/{name}")]))
    )
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "manifest.file" in (error.details() or "")


@pytest.mark.parametrize("how", SAMPLES)
async def test_prompt_of_impossible_size_is_rejected(tiny: Running, how: str) -> None:
    error = await status_of(first_group(tiny, SAMPLES[how]))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(error.details() or "") <= 600
    assert tiny.app.status()["num_accepted"] == 0


@pytest.fixture
async def looping(serve: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Running:
    """A model whose chat template never ends."""
    folder = make_tiny_llama(tmp_path / "looping")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = SLOW_TEMPLATE
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr("poise.generation.sampler._PROMPT_S", 0.3)
    running: Running = await serve(model=str(folder), default_max_tokens=4)
    return running


async def test_looping_template_is_stopped_and_frees_its_thread(looping: Running) -> None:
    for _ in range(3):  # more than there are threads
        error = await status_of(first_group(looping, prompts(chat("x"))))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "takes more than" in (error.details() or "")
    assert (await first_group(looping, prompts(pb.PromptSpec(group_id="g", text="x")))).group_id == "g"
    assert looping.app.status()["num_accepted"] == 0


async def test_looping_template_does_not_freeze_the_service(looping: Running) -> None:
    work = asyncio.gather(*(status_of(first_group(looping, prompts(chat("x")))) for _ in range(4)))
    answers = 0
    while not work.done():
        await looping.client.get_policy()
        answers += 1
    await work
    assert answers > 4  # one template takes as long as many answers


async def test_template_stops_when_its_client_disconnects(looping: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poise.generation.sampler._PROMPT_S", 3600.0)
    calls = [looping.stub.StreamTrajectories(prompts(chat("x"))) for _ in range(4)]
    reads = [asyncio.create_task(call.read()) for call in calls]
    while looping.app.status()["num_accepted"] < 4:
        await asyncio.sleep(0.01)
    for call in calls:
        call.cancel()
    await asyncio.gather(*reads, return_exceptions=True)
    text = "x " * 10_000  # long enough for the threads
    error = await status_of(first_group(looping, prompts(pb.PromptSpec(group_id="g", text=text))))
    assert "max_model_len" in (error.details() or "")


async def test_waiting_pushes_do_not_block_get_policy(tiny: Running) -> None:
    async def idle() -> AsyncIterator[pb.UpdateWeightsRequest]:
        await asyncio.Event().wait()
        yield begin()

    uploads = [tiny.stub.UpdateWeights(idle()) for _ in range(300)]
    assert (await tiny.client.get_policy()).ready
    for upload in uploads:
        upload.cancel()
