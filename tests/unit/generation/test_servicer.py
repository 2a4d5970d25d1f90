"""Requests are checked field by field, and pushes are applied whole or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from tests.support.pushes import push_messages, weight_arrays
from tests.support.scripted_engine import PARAMETERS, ScriptedEngine

from poise.errors import BackendDown, Busy, Conflict, Draining, InvalidRequest, VersionMismatch
from poise.generation.config import GenerationConfig
from poise.generation.engine import EngineRequest
from poise.generation.metrics import GenerationMetrics
from poise.generation.servicer import GenerationServicer
from poise.runtime.rpc.request_stream import RequestStream
from poise_client import WeightPush
from poise_client.codec import decode
from poise_client.types import EncodedPrompt, Group, Policy
from poise_proto.v1 import generation_pb2 as pb

Build = Callable[..., GenerationConfig]
CONTEXT: Any = None
"""The servicer does not use it."""


class Service:
    """A servicer called without a network."""

    def __init__(self, engine: ScriptedEngine, config: GenerationConfig) -> None:
        self.engine = engine
        self.config = config
        self.not_ready_reason = ""
        self.registry = CollectorRegistry()
        metrics = GenerationMetrics(
            self.registry, lambda: self.servicer.sampler.num_running, lambda: self.servicer.sampler.num_accepted
        )
        self.servicer = GenerationServicer(engine, config, metrics, lambda: self.not_ready_reason)

    async def stream(self, request: pb.StreamTrajectoriesRequest) -> list[Group]:
        return [decode(group, Group) async for group in self.servicer.StreamTrajectories(request, CONTEXT)]

    async def encode(self, request: pb.EncodePromptsRequest) -> list[EncodedPrompt]:
        return [decode(prompt, EncodedPrompt) async for prompt in self.servicer.EncodePrompts(request, CONTEXT)]

    async def push(self, messages: Iterable[pb.UpdateWeightsRequest]) -> pb.UpdateWeightsResponse:
        async def sent() -> AsyncIterator[pb.UpdateWeightsRequest]:
            for message in messages:
                yield message

        return await self.servicer.UpdateWeights(sent(), CONTEXT)

    async def policy(self) -> Policy:
        return decode(await self.servicer.GetPolicy(pb.GetPolicyRequest(), CONTEXT), Policy)

    def staged(self) -> list[Path]:
        return list(self.config.staging_dir.rglob("*.safetensors"))

    def metric(self, name: str) -> float | None:
        return self.registry.get_sample_value(f"poise_generation_{name}")


@pytest.fixture
def service(engine: ScriptedEngine, config: Build) -> Service:
    return Service(engine, config())


def request_of(**changes: Any) -> pb.StreamTrajectoriesRequest:
    prompts = [pb.PromptSpec(group_id="g0", text="hi"), pb.PromptSpec(group_id="g1", text="ho")]
    return pb.StreamTrajectoriesRequest(**{"run_id": "run", "prompts": prompts} | changes)


def weights(seed: float = 0.0) -> dict[str, np.ndarray]:
    return {name: np.full(shape, seed, np.float32) for name, shape in PARAMETERS.items()}


def prompts(*specs: dict[str, Any]) -> list[pb.PromptSpec]:
    return [pb.PromptSpec(**{"group_id": f"g{i}", "text": "x"} | spec) for i, spec in enumerate(specs)]


SYSTEM, USER, ASSISTANT = pb.CHAT_ROLE_SYSTEM, pb.CHAT_ROLE_USER, pb.CHAT_ROLE_ASSISTANT


def chat(*roles: int) -> pb.ChatPrompt:
    return pb.ChatPrompt(messages=[pb.ChatMessage(role=role, content="x") for role in roles])


def sampling(**fields: Any) -> dict[str, Any]:
    return {"sampling": pb.SamplingParams(**fields)}


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"run_id": ""}, ["run_id"]),
        ({"run_id": "a b"}, ["run_id"]),
        ({"run_id": "x" * 129}, ["run_id"]),
        ({"num_rollouts": 257}, ["num_rollouts"]),
        ({"prompts": []}, ["prompts"]),
        ({"prompts": prompts(*[{}] * 4097)}, ["prompts"]),
        ({"prompts": prompts({}, {"group_id": ""})}, ["prompts[1].group_id"]),
        ({"prompts": prompts({}, {"group_id": "no spaces"})}, ["prompts[1].group_id"]),
        ({"prompts": prompts({}, {"group_id": "g0"})}, ["prompts[1].group_id"]),
        ({"prompts": [pb.PromptSpec(group_id="g")]}, ["prompts[0].prompt"]),
        ({"prompts": [pb.PromptSpec(group_id="g", chat=chat())]}, ["prompts[0].chat"]),
        ({"prompts": [pb.PromptSpec(group_id="g", tokens=pb.TokenPrompt())]}, ["prompts[0].tokens"]),
        ({"prompts": [pb.PromptSpec(group_id="g", text="")]}, ["prompts[0].text"]),
        ({"prompts": [pb.PromptSpec(group_id="g", tokens={"token_ids": [256]})]}, ["prompts[0].tokens.token_ids"]),
        ({"prompts": [pb.PromptSpec(group_id="g", chat=chat(USER, 0))]}, ["prompts[0].chat.messages[1].role"]),
        ({"prompts": [pb.PromptSpec(group_id="g", chat=chat(77))]}, ["prompts[0].chat.messages[0].role"]),
        (sampling(temperature=-0.1), ["sampling.temperature"]),
        (sampling(temperature=0.0099), ["sampling.temperature"]),
        (sampling(temperature=100.1), ["sampling.temperature"]),
        (sampling(temperature=float("nan")), ["sampling.temperature"]),
        (sampling(temperature=float("inf")), ["sampling.temperature"]),
        (sampling(top_p=0.0), ["sampling.top_p"]),
        (sampling(top_p=1.01), ["sampling.top_p"]),
        (sampling(top_p=float("nan")), ["sampling.top_p"]),
        (sampling(stop=["x"] * 17), ["sampling.stop"]),
        (sampling(stop=["x", ""]), ["sampling.stop[1]"]),
        (sampling(stop=["x" * 257]), ["sampling.stop[0]"]),
        (sampling(stop_token_ids=[1] * 17), ["sampling.stop_token_ids"]),
        (sampling(stop_token_ids=[255, 256, 2**32 - 1]), [f"sampling.stop_token_ids[{i}]" for i in (1, 2)]),
        (
            {"run_id": "", "num_rollouts": 999, "prompts": prompts({"group_id": ""})}
            | sampling(top_p=2, temperature=-1),
            ["run_id", "num_rollouts", "prompts[0].group_id", "sampling.temperature", "sampling.top_p"],
        ),
    ],
)
async def test_wrong_fields_are_all_named(service: Service, changes: dict[str, Any], fields: list[str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await service.stream(request_of(**changes))
    assert [violation.field for violation in caught.value.violations] == fields
    assert service.engine.requests == []
    assert service.servicer.sampler.num_accepted == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": "x" * 128},
        {"run_id": "A/b:c_d.e-9"},
        {"num_rollouts": 256},
        {"prompts": [pb.PromptSpec(group_id="g", chat=chat(SYSTEM, USER, ASSISTANT))]},
        {"prompts": [pb.PromptSpec(group_id="g", tokens={"token_ids": [0, 255]})]},
        sampling(temperature=0.0),
        sampling(temperature=0.01),
        sampling(temperature=100.0),
        sampling(top_p=1e-6, top_k=2**32 - 1, max_tokens=2**32 - 1, seed=2**64 - 1),
        sampling(stop=["x" * 256] * 16),
        {"step": 2**64 - 1},
    ],
)
async def test_values_at_the_limits_are_accepted(service: Service, changes: dict[str, Any]) -> None:
    assert await service.stream(request_of(**changes))


async def test_maximum_number_of_prompts_is_accepted(service: Service) -> None:
    assert len(await service.stream(request_of(prompts=prompts(*[{}] * 4096)))) == 4096


async def test_unset_fields_take_their_defaults(service: Service) -> None:
    groups = await service.stream(request_of())
    assert [len(group.rollouts) for group in groups] == [1, 1]
    requested = service.engine.requests[0].sampling
    assert (requested.temperature, requested.top_p, requested.top_k, requested.stop, requested.seed) == (
        1.0,
        1.0,
        0,
        (),
        None,
    )
    assert requested.max_tokens == service.config.default_max_tokens


async def test_sampling_reaches_the_engine(service: Service) -> None:
    await service.stream(
        request_of(
            **sampling(temperature=0.5, top_p=0.25, top_k=3, max_tokens=5, stop=["a", "b"], stop_token_ids=[7, 9])
        )
    )
    requested = service.engine.requests[0].sampling
    assert (requested.temperature, requested.top_p, requested.top_k, requested.max_tokens) == (0.5, 0.25, 3, 5)
    assert (requested.stop, requested.stop_token_ids) == (("a", "b"), (7, 9))


async def test_rejection_names_the_reason(service: Service) -> None:
    service.not_ready_reason = "paused for tea"
    with pytest.raises(Draining, match="paused for tea") as caught:
        await service.stream(request_of())
    assert caught.value.retry_after_s
    policy = await service.policy()
    assert (policy.ready, policy.not_ready_reason) == (False, "paused for tea")


async def test_min_policy_version_is_checked_against_the_served(service: Service) -> None:
    assert len(await service.stream(request_of(min_policy_version=0))) == 2
    with pytest.raises(VersionMismatch, match="min_policy_version is 3; version 0 is served"):
        await service.stream(request_of(min_policy_version=3))
    await service.push(push_messages(weights(), 3))
    (group, _) = await service.stream(request_of(min_policy_version=3))
    assert group.rollouts[0].version_spans[0].policy_version == 3
    with pytest.raises(VersionMismatch):
        await service.stream(request_of(min_policy_version=4))


async def test_tokens_beyond_the_vocabulary_reject_their_prompt(service: Service) -> None:
    service.engine.tokenize = lambda content, limit: [300] if content == "ho" else [1]  # type: ignore[method-assign]
    with pytest.raises(InvalidRequest) as caught:
        await service.stream(request_of())
    assert [violation.field for violation in caught.value.violations] == ["prompts[1].text"]
    assert "has token 300; required: 0 to 255, the model's vocabulary" in str(caught.value)
    assert service.engine.requests == []


async def test_checked_prompts_have_a_length_or_a_problem(service: Service) -> None:
    def tokenize(content: Any, limit: Any) -> list[int]:
        if content == "no":
            raise InvalidRequest.field("text", "cannot be")
        return [300] if content == "far" else list(str(content).encode())

    service.engine.tokenize = tokenize  # type: ignore[method-assign]
    service.not_ready_reason = "waits for weights"  # checking works without weights
    texts = [{"text": text} for text in ("x", "no", "far", "", "x" * 999)]
    specs = prompts(*texts, {"tokens": {"token_ids": [256]}})

    answer = await service.servicer.CheckPrompts(pb.CheckPromptsRequest(prompts=specs), CONTEXT)

    assert [check.group_id for check in answer.prompts] == [f"g{i}" for i in range(6)]
    assert [check.num_tokens for check in answer.prompts] == [1, 0, 0, 0, 999, 0]
    assert [check.problem.partition(";")[0] for check in answer.prompts] == [
        "",
        "text: cannot be",
        "text: has token 300",
        "text: has no tokens",
        "",
        "tokens.token_ids: has token 256",
    ]


async def test_wrong_fields_of_prompts_to_check_are_all_named(service: Service) -> None:
    specs = [*prompts({}, {"group_id": "a b"}), pb.PromptSpec(group_id="g", chat=chat(77))]
    with pytest.raises(InvalidRequest) as caught:
        await service.servicer.CheckPrompts(pb.CheckPromptsRequest(prompts=specs), CONTEXT)
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["prompts[1].group_id", "prompts[2].chat.messages[0].role"]


def encoding_of(*specs: pb.PromptSpec) -> pb.EncodePromptsRequest:
    return pb.EncodePromptsRequest(prompts=specs)


async def test_prompts_are_encoded_with_the_version_served(service: Service) -> None:
    await service.push(push_messages(weights(), 3))
    encoded = await service.encode(encoding_of(*prompts({}, {"tokens": {"token_ids": [1, 2]}})))
    assert [(p.group_id, p.num_prompt_tokens, p.policy_version) for p in encoded] == [("g0", 1, 3), ("g1", 2, 3)]
    assert [p.prompt_hidden.shape for p in encoded] == [(4,), (4,)]


@pytest.mark.parametrize(
    ("specs", "fields"),
    [
        ([], ["prompts"]),
        (prompts(*[{}] * 4097), ["prompts"]),
        (prompts({}, {"group_id": ""}, {"group_id": "g0"}), ["prompts[1].group_id", "prompts[2].group_id"]),
        ([pb.PromptSpec(group_id="g")], ["prompts[0].prompt"]),
        ([pb.PromptSpec(group_id="g", chat=chat(77))], ["prompts[0].chat.messages[0].role"]),
        (prompts({}, {"text": "x" * 64}), ["prompts[1].prompt"]),
    ],
)
async def test_wrong_fields_of_prompts_to_encode_are_all_named(
    service: Service, specs: list[pb.PromptSpec], fields: list[str]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await service.encode(encoding_of(*specs))
    assert [violation.field for violation in caught.value.violations] == fields
    assert service.engine.requests == []


async def test_encoding_is_rejected_when_rollouts_are(service: Service) -> None:
    service.not_ready_reason = "paused for tea"
    with pytest.raises(Draining, match="paused for tea") as caught:
        await service.encode(encoding_of(*prompts({})))
    assert caught.value.retry_after_s


async def test_closed_encoding_frees_the_engine_before_it_returns(service: Service) -> None:
    async def hold_second(request: EngineRequest) -> None:
        if bytes(request.prompt_token_ids) == b"ho":
            await asyncio.Event().wait()

    service.engine.before_rollout = hold_second
    encoded = service.servicer.EncodePrompts(encoding_of(*request_of().prompts), CONTEXT)
    await anext(encoded)
    await encoded.aclose()  # type: ignore[attr-defined]
    assert service.engine.num_aborted == 1
    assert service.servicer.sampler.num_accepted == 0


async def test_closed_stream_frees_the_engine_before_it_returns(service: Service) -> None:
    async def hold_second(request: EngineRequest) -> None:
        if bytes(request.prompt_token_ids) == b"ho":
            await asyncio.Event().wait()

    service.engine.before_rollout = hold_second
    groups = service.servicer.StreamTrajectories(request_of(), CONTEXT)
    await anext(groups)
    await groups.aclose()  # type: ignore[attr-defined]
    assert service.engine.num_aborted == 1
    assert service.servicer.sampler.num_accepted == 0


async def test_finished_groups_are_counted(service: Service) -> None:
    await service.stream(request_of(num_rollouts=3))
    assert service.registry.get_sample_value("poise_generation_rollouts_total", {"finish_reason": "length"}) == 6
    assert service.metric("response_tokens_total") == 6 * 8
    assert service.metric("running_rollouts") == service.metric("accepted_rollouts") == 0


async def test_death_of_the_engine_is_retryable_and_a_defect_is_not(service: Service) -> None:
    async def fail(_: object) -> None:
        raise RuntimeError("a defect")

    async def die(_: object) -> None:
        service.engine.die()
        raise RuntimeError("broken pipe")

    for call in (
        lambda: service.stream(request_of()),
        lambda: service.encode(encoding_of(*prompts({}))),
        lambda: service.push(push_messages(weights(), 1)),
    ):
        service.engine.before_rollout = service.engine.before_update = fail
        with pytest.raises(RuntimeError, match="a defect"):
            await call()
        service.engine.before_rollout = service.engine.before_update = die
        with pytest.raises(BackendDown, match="died") as caught:
            await call()
        assert caught.value.retry_after_s
        await service.engine.start()
    assert service.servicer.policy.policy_version == 0
    assert service.staged() == []


async def test_policy_describes_what_is_served(service: Service) -> None:
    before = await service.policy()
    assert (before.lineage_id, before.policy_version, before.digest, before.ready) == ("", 0, b"", True)
    assert (before.model, before.hidden_size, before.feature_layer, before.max_model_len) == ("scripted", 4, 1, 64)
    messages = push_messages(weights(), 7, lineage="a")
    await service.push(messages)
    after = await service.policy()
    assert (after.lineage_id, after.policy_version, after.digest) == ("a", 7, messages[0].manifest.digest)
    assert after.instance_id == before.instance_id
    assert service.metric("policy_version") == 7


async def test_loading_model_has_no_policy(config: Build) -> None:
    service = Service(ScriptedEngine(), config())
    with pytest.raises(BackendDown, match="loading"):
        await service.policy()
    with pytest.raises(BackendDown, match="loading"):
        await service.push(push_messages(weights(), 1))


async def test_push_is_applied_once(service: Service) -> None:
    applied: list[Path] = []

    async def note(path: Path) -> None:
        applied.append(path)

    service.engine.before_update = note
    first = await service.push(push_messages(weights(), 1))
    assert (first.policy_version, first.already_applied) == (1, False)
    assert first.pause_s > 0
    again = await service.push(push_messages(weights(), 1))
    assert (again.policy_version, again.already_applied) == (1, True)
    assert len(applied) == 1
    assert service.staged() == []


@pytest.mark.parametrize(("version", "value"), [(5, 1.0), (4, 0.0), (0, 0.0)])
async def test_version_already_used_or_older_is_a_conflict(service: Service, version: int, value: float) -> None:
    await service.push(push_messages(weights(), 5))
    with pytest.raises(Conflict):
        await service.push(push_messages(weights(value), version))
    assert service.servicer.policy.policy_version == 5
    assert (await service.push(push_messages(weights(), version, lineage="another"))).policy_version == version


def broken(how: str) -> list[pb.UpdateWeightsRequest]:
    """Return the messages of a push with one error."""
    arrays = weights(1.0)
    if how == "wrong shape":
        arrays["second.weight"] = np.ones(6, np.float32)
    if how == "missing parameter":
        del arrays["second.weight"]
    if how == "unknown parameter":
        arrays["third.weight"] = np.ones(1, np.float32)
    begin, *chunks, commit = push_messages(arrays, 9, chunk_bytes=16)
    match how:
        case "damaged":
            chunks[1].chunk.data = b"\xff" + chunks[1].chunk.data[1:]
        case "wrong digest":
            begin.manifest.digest = b"x" * 32
        case "no lineage":
            begin.manifest.lineage_id = ""
        case "nothing":
            return []
        case "no begin":
            return [*chunks, commit]
        case "manifest twice":
            return [begin, begin, *chunks, commit]
        case "no part":
            chunks[1] = pb.UpdateWeightsRequest()
        case "cut off in the chunks":
            return [begin, *chunks[:-1]]
        case "cut off before the commit":
            return [begin, *chunks]
        case "committed early":
            return [begin, *chunks[:-1], commit]
        case "wrong total":
            commit.commit.total_bytes += 1
        case "out of order":
            chunks[0], chunks[1] = chunks[1], chunks[0]
        case "chunk left out":
            del chunks[1]
        case "too much":
            chunks.append(pb.UpdateWeightsRequest(chunk={"offset": commit.commit.total_bytes, "data": b"x"}))
        case "empty chunk":
            chunks.insert(1, pb.UpdateWeightsRequest(chunk={"offset": 16, "data": b""}))
        case "large chunk":
            chunks[0].chunk.data = bytes(2 * 2**20 + 1)
        case "no tensors":
            begin.manifest.ClearField("tensors")
        case "wrong dtype":
            begin.manifest.tensors[0].dtype = 5
        case "larger than may be":
            begin.manifest.tensors[0].shape[:] = [2**20, 2**20]
    return [begin, *chunks, commit]


@pytest.mark.parametrize(
    ("how", "field"),
    [
        ("damaged", "manifest.tensors[0].sha256"),
        ("wrong digest", "manifest.digest"),
        ("no lineage", "manifest.lineage_id"),
        ("nothing", "part"),
        ("no begin", "part"),
        ("manifest twice", "part"),
        ("no part", "part"),
        ("cut off in the chunks", "part"),
        ("cut off before the commit", "part"),
        ("committed early", "commit.total_bytes"),
        ("wrong total", "commit.total_bytes"),
        ("out of order", "chunk.offset"),
        ("chunk left out", "chunk.offset"),
        ("too much", "chunk.data"),
        ("empty chunk", "chunk.data"),
        ("large chunk", "chunk.data"),
        ("no tensors", "manifest.tensors"),
        ("wrong dtype", "manifest.tensors[0].dtype"),
        ("larger than may be", "manifest.tensors"),
        ("wrong shape", "tensors"),
        ("missing parameter", "tensors"),
        ("unknown parameter", "tensors"),
    ],
)
async def test_broken_push_changes_nothing_and_leaves_nothing(
    engine: ScriptedEngine, config: Build, how: str, field: str
) -> None:
    service = Service(engine, config(max_update_bytes=1000))
    await service.push(push_messages(weights(), 5))
    applied: list[Path] = []

    async def note(path: Path) -> None:
        applied.append(path)

    engine.before_update = note
    with pytest.raises(InvalidRequest) as caught:
        await service.push(broken(how))
    assert [violation.field for violation in caught.value.violations] == [field]
    assert applied == []
    assert service.servicer.policy.policy_version == 5
    assert service.staged() == []
    groups = await service.stream(request_of())
    assert {span.policy_version for g in groups for r in g.rollouts for span in r.version_spans} == {5}
    assert (await service.push(push_messages(weights(1.0), 9))).policy_version == 9


async def test_payload_through_a_group_is_rejected_without_nccl(service: Service) -> None:
    push = WeightPush.prepare("lineage", 1, weight_arrays(weights())).through_group("gloo", b"host:1", 10.0)
    with pytest.raises(InvalidRequest, match="`nccl` is unset"):
        await service.push(push.messages())
    assert (await service.policy()).process_group_backend == ""
    assert service.staged() == []


@pytest.mark.parametrize("num_sent", [0, 1, 2])
async def test_silent_push_is_ended(service: Service, num_sent: int) -> None:
    async def silent() -> AsyncIterator[bytes]:
        for message in push_messages(weights(), 1)[:num_sent]:
            yield message.SerializeToString()
        await asyncio.Event().wait()

    requests = RequestStream(pb.UpdateWeightsRequest.FromString, silent(), budget_s=0.01)
    with pytest.raises(InvalidRequest, match="arrives too slowly"):
        await service.servicer.UpdateWeights(requests, CONTEXT)
    assert service.staged() == []
    assert (await service.push(push_messages(weights(), 1))).policy_version == 1


async def test_second_push_at_once_is_busy(service: Service) -> None:
    release = asyncio.Event()

    async def halting() -> AsyncIterator[pb.UpdateWeightsRequest]:
        begin, *rest = push_messages(weights(), 1)
        yield begin
        await release.wait()
        for message in rest:
            yield message

    first = asyncio.create_task(service.servicer.UpdateWeights(halting(), CONTEXT))
    while not service.staged():
        await asyncio.sleep(0)
    with pytest.raises(Busy) as caught:
        await service.push(push_messages(weights(), 2))
    assert caught.value.retry_after_s
    release.set()
    assert (await first).policy_version == 1
    assert (await service.push(push_messages(weights(), 2))).policy_version == 2


async def test_push_cancelled_while_received_leaves_nothing(service: Service) -> None:
    async def halting() -> AsyncIterator[pb.UpdateWeightsRequest]:
        yield push_messages(weights(), 1)[0]
        await asyncio.Event().wait()

    push = asyncio.create_task(service.servicer.UpdateWeights(halting(), CONTEXT))
    while not service.staged():
        await asyncio.sleep(0)
    push.cancel()
    with pytest.raises(asyncio.CancelledError):
        await push
    assert service.staged() == []
    assert (await service.push(push_messages(weights(), 1))).policy_version == 1


@pytest.mark.parametrize("works", [True, False])
async def test_push_cancelled_while_applied_ends_before_the_next(service: Service, works: bool) -> None:
    applying, release = asyncio.Event(), asyncio.Event()
    there: list[bool] = []

    async def hold(path: Path) -> None:
        applying.set()
        await release.wait()
        there.append(path.exists())
        if not works:
            raise InvalidRequest.field("weights", "do not fit")

    service.engine.before_update = hold
    push = asyncio.create_task(service.push(push_messages(weights(), 1)))
    await applying.wait()
    push.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not push.done()
    with pytest.raises(Busy):
        await service.push(push_messages(weights(), 2))
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await push
    assert there == [True]
    assert service.staged() == []
    assert service.servicer.policy.policy_version == int(works)
    assert service.metric("policy_version") == int(works)
    assert (await service.policy()).policy_version == int(works)
