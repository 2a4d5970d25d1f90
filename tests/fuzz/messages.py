"""Valid, or nearly valid, messages of every RPC, from which the fuzzer starts."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from poise_client import combine_digests
from poise_client.codec import LABEL_SCHEMA_VERSION
from poise_proto.v1 import common_pb2, generation_pb2, learner_pb2, value_pb2

FUTURE_VERSION = 2**40
"""The learner rejects rollouts of this run by name, so nothing is trained."""


@dataclass(frozen=True, slots=True)
class Rpc:
    """One RPC."""

    service: str
    """The process that serves it."""
    method: str
    """`/package.Service/Method`."""
    is_streaming: tuple[bool, bool]
    """Whether requests are a stream, and whether answers are."""
    make: Callable[[random.Random, int], list[Message]]
    """Makes valid requests for a model of the given width."""
    weight: float
    """Relative frequency of its calls."""
    is_status: bool = False
    """Whether it must be answered under any load."""


def _floats(random_: random.Random, count: int) -> common_pb2.Tensor:
    data = struct.pack(f"<{count}f", *(random_.random() for _ in range(count)))
    return common_pb2.Tensor(dtype=common_pb2.DTYPE_FLOAT32, shape=[count], data=data)


def _ints(values: Sequence[int]) -> common_pb2.Tensor:
    data = b"".join(value.to_bytes(4, "little") for value in values)
    return common_pb2.Tensor(dtype=common_pb2.DTYPE_INT32, shape=[len(values)], data=data)


def _features(random_: random.Random, width: int) -> common_pb2.RolloutFeatures:
    entropy = common_pb2.EntropyStats(mean=0.5, last=0.2, max=1.0, min=0.1)
    return common_pb2.RolloutFeatures(
        prompt_hidden=_floats(random_, width),
        response_hidden=_floats(random_, width),
        output_entropy=entropy,
        reasoning_entropy=entropy,
        answer_entropy=entropy,
    )


def _prompts(random_: random.Random) -> list[generation_pb2.PromptSpec]:
    turns = [
        generation_pb2.ChatMessage(role="CHAT_ROLE_USER", content="max482="),
        generation_pb2.ChatMessage(role="CHAT_ROLE_ASSISTANT"),
    ]
    kinds = (
        {"text": "max482="},
        {"chat": generation_pb2.ChatPrompt(messages=turns)},
        {"tokens": generation_pb2.TokenPrompt(token_ids=[1, 2, 3])},
    )
    return [
        generation_pb2.PromptSpec(group_id=f"g{i}", **random_.choice(kinds))  # type: ignore[arg-type]
        for i in range(random_.randint(1, 2))
    ]


def _stream_trajectories(random_: random.Random, width: int) -> list[Message]:
    sampling = generation_pb2.SamplingParams(temperature=1.0, top_p=1.0, max_tokens=2, stop=["="], seed=7)
    return [
        generation_pb2.StreamTrajectoriesRequest(
            run_id="fuzz", step=1, prompts=_prompts(random_), num_rollouts=1, sampling=sampling
        )
    ]


def _encode_prompts(random_: random.Random, width: int) -> list[Message]:
    return [generation_pb2.EncodePromptsRequest(prompts=_prompts(random_))]


def _check_prompts(random_: random.Random, width: int) -> list[Message]:
    return [generation_pb2.CheckPromptsRequest(prompts=_prompts(random_))]


def _update_weights(random_: random.Random, width: int) -> list[Message]:
    """Return a valid push of parameters that no model has, which is rejected at its end."""
    bodies = {f"fuzz.{i}": random_.randbytes(8) for i in range(2)}
    hashes = {name: hashlib.sha256(body).digest() for name, body in bodies.items()}
    tensors = [
        generation_pb2.WeightTensor(name=name, dtype=common_pb2.DTYPE_FLOAT32, shape=[2], sha256=hashes[name])
        for name in bodies
    ]
    begin = generation_pb2.WeightsManifest(
        lineage_id="fuzz", policy_version=1, tensors=tensors, digest=combine_digests(hashes)
    )
    match random_.randrange(6):
        case 0:
            begin.base.CopyFrom(generation_pb2.WeightsBase(lineage_id="fuzz", policy_version=1, digest=bytes(32)))
        case 1:
            begin.file = random_.choice(("/dev/shm/fuzz", "/dev/shm/../etc/passwd", "fuzz", "/dev/shm"))
        case 2:
            begin.adapter.CopyFrom(generation_pb2.WeightsAdapter(rank=2, alpha=4.0, base_digest=bytes(32)))
        case 3:
            begin.process_group.CopyFrom(
                generation_pb2.ProcessGroup(
                    backend="PROCESS_GROUP_BACKEND_GLOO", rendezvous=b"127.0.0.1:1", timeout_s=1
                )
            )
        case _:
            pass
    body = b"".join(bodies.values())
    return [
        generation_pb2.UpdateWeightsRequest(manifest=begin),
        generation_pb2.UpdateWeightsRequest(chunk=generation_pb2.WeightsChunk(offset=0, data=body[:10])),
        generation_pb2.UpdateWeightsRequest(chunk=generation_pb2.WeightsChunk(offset=10, data=body[10:])),
        generation_pb2.UpdateWeightsRequest(commit=generation_pb2.WeightsCommit(total_bytes=len(body))),
    ]


def _estimate_baselines(random_: random.Random, width: int) -> list[Message]:
    group = value_pb2.GroupFeatures(
        group_id="g",
        domain="fuzz",
        rollouts=[_features(random_, width) for _ in range(2)],
        rewards=_floats(random_, 2),
    )
    return [value_pb2.EstimateBaselinesRequest(run_id="fuzz", step=random_.randrange(50), groups=[group])]


def _score_prompts(random_: random.Random, width: int) -> list[Message]:
    prompt = value_pb2.PromptFeatures(group_id="g", domain="fuzz", prompt_hidden=_floats(random_, width))
    return [value_pb2.ScorePromptsRequest(prompts=[prompt])]


def _publish_labels(random_: random.Random, width: int) -> list[Message]:
    label = value_pb2.LabelledGroup(
        schema_version=LABEL_SCHEMA_VERSION,
        run_id="fuzz",
        step=random_.randrange(2000),
        group_id=f"g{random_.randrange(1000)}",
        domain="fuzz",
        rollouts=[_features(random_, width) for _ in range(2)],
        rewards=_floats(random_, 2),
        num_rollouts=2,
    )
    return [value_pb2.PublishLabelsRequest(groups=[label])]


def _submit_advantages(random_: random.Random, width: int) -> list[Message]:
    num_rollouts = random_.randint(1, 2)
    header = learner_pb2.BatchHeader(
        run_id="fuzz", batch_id=f"b{random_.randrange(10**9)}", step=0, num_rollouts=num_rollouts, temperature=1.0
    )
    rollouts = [
        learner_pb2.TrainingRollout(
            id=common_pb2.RolloutId(run_id="fuzz", step=random_.randrange(10**9), group_id="g", rollout_index=index),
            prompt_token_ids=_ints([1, 2, 3]),
            token_ids=_ints([1, 2]),
            logprobs=common_pb2.Tensor(dtype=common_pb2.DTYPE_FLOAT32, shape=[2], data=bytes(8)),
            advantage=0.5,
            version_spans=[common_pb2.VersionSpan(start_token=0, end_token=2, policy_version=FUTURE_VERSION)],
        )
        for index in range(num_rollouts)
    ]
    return [
        learner_pb2.SubmitAdvantagesRequest(header=header),
        *(learner_pb2.SubmitAdvantagesRequest(rollout=rollout) for rollout in rollouts),
    ]


def _reflection(random_: random.Random, width: int) -> list[Message]:
    return [reflection_pb2.ServerReflectionRequest(file_containing_symbol="poise.v1.ValueService")]


_ONE, _ANSWERS, _UPLOAD, _BOTH = (False, False), (False, True), (True, False), (True, True)

RPCS = (
    Rpc("generation", "/poise.v1.GenerationService/StreamTrajectories", _ANSWERS, _stream_trajectories, 1.5),
    Rpc("generation", "/poise.v1.GenerationService/EncodePrompts", _ANSWERS, _encode_prompts, 1.5),
    Rpc("generation", "/poise.v1.GenerationService/CheckPrompts", _ONE, _check_prompts, 1.5),
    Rpc("generation", "/poise.v1.GenerationService/UpdateWeights", _UPLOAD, _update_weights, 5),
    Rpc(
        *("generation", "/poise.v1.GenerationService/GetPolicy", _ONE),
        *(lambda *_: [generation_pb2.GetPolicyRequest()], 1, True),
    ),
    Rpc("value", "/poise.v1.ValueService/EstimateBaselines", _ONE, _estimate_baselines, 5),
    Rpc("value", "/poise.v1.ValueService/ScorePrompts", _ONE, _score_prompts, 4),
    Rpc("value", "/poise.v1.ValueService/PublishLabels", _ONE, _publish_labels, 4),
    Rpc("value", "/poise.v1.ValueService/GetProbe", _ONE, lambda *_: [value_pb2.GetProbeRequest(domain="")], 1),
    Rpc("learner", "/poise.v1.LearnerService/SubmitAdvantages", _UPLOAD, _submit_advantages, 6),
    Rpc("learner", "/poise.v1.LearnerService/GetStatus", _ONE, lambda *_: [learner_pb2.GetStatusRequest()], 1, True),
    Rpc(
        *("learner", "/poise.v1.LearnerService/ExportModel", _ONE),
        *(lambda *_: [learner_pb2.ExportModelRequest(name="fuzz\n")], 0.3),
    ),
    *(
        rpc
        for service in ("generation", "value", "learner")
        for rpc in (
            Rpc(
                *(service, "/grpc.health.v1.Health/Check", _ONE),
                *(lambda *_: [health_pb2.HealthCheckRequest(service="")], 0.3, True),
            ),
            Rpc(
                *(service, "/grpc.health.v1.Health/Watch", _ANSWERS),
                *(lambda *_: [health_pb2.HealthCheckRequest(service="")], 0.1),
            ),
            Rpc(service, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", _BOTH, _reflection, 0.3),
        )
    ),
)
