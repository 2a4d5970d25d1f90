"""Conversions that do more than copy fields: features, groups, prompts, batches and status-dependent messages."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np

from poise_client.codec._mapper import (
    decode,
    decode_fields,
    encode,
    encode_fields,
    enum_name,
    enum_number,
    join,
    register,
)
from poise_client.codec._tensor import CodecError, from_tensor, vector, wire_bytes
from poise_client.types import (
    DEFAULT_DOMAIN,
    Batch,
    EntropyStats,
    Features,
    Floats,
    Group,
    GroupBaselines,
    Halves,
    Ints,
    LearnerStatus,
    Message,
    Prompt,
    PromptFeatures,
    PromptScore,
    Rollout,
    RolloutId,
    StepResult,
)
from poise_proto.v1 import common_pb2, generation_pb2, learner_pb2, value_pb2

LABEL_SCHEMA_VERSION = 2
"""The only schema of LabelledGroup that this code reads and writes."""

_REASONS = learner_pb2.RejectionReason.DESCRIPTOR
_ROLES = generation_pb2.ChatRole.DESCRIPTOR
_BACKENDS = generation_pb2.ProcessGroupBackend.DESCRIPTOR


# Features. Written by hand for speed: the value service reads thousands of them per call.


def _encode_features(features: Features, kind: type[Any], path: str) -> common_pb2.RolloutFeatures:
    prompt_hidden, response_hidden = features.prompt_hidden, features.response_hidden
    return common_pb2.RolloutFeatures(
        prompt_hidden=vector(prompt_hidden, join(path, "prompt_hidden")) if prompt_hidden.size else None,
        response_hidden=vector(response_hidden, join(path, "response_hidden")) if response_hidden.size else None,
        output_entropy=_encode_entropy(features.output_entropy),
        reasoning_entropy=_encode_entropy(features.reasoning_entropy),
        answer_entropy=_encode_entropy(features.answer_entropy),
    )


def _encode_rollout_features(rollout: Rollout, path: str) -> common_pb2.RolloutFeatures:
    """Return the features of a rollout with its token statistics, if it has any."""
    message = _encode_features(rollout.features, common_pb2.RolloutFeatures, path)
    if rollout.sum_squared_probs.size:
        tokens = common_pb2.TokenStatistics(
            logprobs=vector(rollout.logprobs, join(path, "tokens.logprobs")),
            entropies=vector(rollout.token_entropies, join(path, "tokens.entropies"), "float16"),
            sum_squared_probs=vector(rollout.sum_squared_probs, join(path, "tokens.sum_squared_probs"), "float16"),
        )
        message.tokens.CopyFrom(tokens)
    return message


def decode_token_statistics(message: common_pb2.TokenStatistics, path: str) -> tuple[Floats, Halves, Halves]:
    """Return log-probabilities, entropies and sums of squared probabilities, [T] each.

    Raises:
        CodecError: an array is missing or malformed, or their lengths differ.
    """
    logprobs = from_tensor(message.logprobs, field=join(path, "logprobs"))
    entropies = from_tensor(message.entropies, dtype="float16", field=join(path, "entropies"))
    squares = from_tensor(message.sum_squared_probs, dtype="float16", field=join(path, "sum_squared_probs"))
    for name, array in (("entropies", entropies), ("sum_squared_probs", squares)):
        if array.shape != logprobs.shape:
            raise CodecError(
                join(path, name), f"has {array.size} elements, but logprobs has {logprobs.size}; required: equal"
            )
    return logprobs, entropies, squares


def _decode_features(message: common_pb2.RolloutFeatures, path: str) -> Features:
    prompt_hidden = response_hidden = Features().prompt_hidden
    if message.HasField("response_hidden"):
        prompt_hidden, response_hidden = decode_hidden(message, path)
    elif message.HasField("prompt_hidden"):
        prompt_hidden = from_tensor(message.prompt_hidden, field=join(path, "prompt_hidden"))
    return Features(
        prompt_hidden,
        response_hidden,
        _decode_entropy(message.output_entropy),
        _decode_entropy(message.reasoning_entropy),
        _decode_entropy(message.answer_entropy),
    )


def _encode_entropy(stats: EntropyStats) -> common_pb2.EntropyStats:
    return common_pb2.EntropyStats(mean=stats.mean, last=stats.last, max=stats.max, min=stats.min)


def _decode_entropy(message: common_pb2.EntropyStats) -> EntropyStats:
    return EntropyStats(message.mean, message.last, message.max, message.min)


def decode_hidden(message: common_pb2.RolloutFeatures, path: str = "features") -> tuple[Floats, Floats]:
    """Return the hidden states of prompt and response.

    Raises:
        CodecError: a state is missing or malformed, or their widths differ.
    """
    prompt_hidden = from_tensor(message.prompt_hidden, field=join(path, "prompt_hidden"))
    response_hidden = from_tensor(message.response_hidden, field=join(path, "response_hidden"))
    if prompt_hidden.shape != response_hidden.shape:
        raise CodecError(
            join(path, "response_hidden"),
            f"has width {response_hidden.size}, but prompt_hidden has {prompt_hidden.size}; required: equal",
        )
    return prompt_hidden, response_hidden


# Rollouts and groups.


def _decode_rollout(message: generation_pb2.Rollout | learner_pb2.TrainingRollout, path: str, **more: Any) -> Rollout:
    rollout = decode_fields(message, Rollout, path, **more)
    arrays: list[tuple[str, Floats | Halves | None]] = [
        ("logprobs", rollout.logprobs),
        ("advantages", rollout.advantages),
    ]
    if isinstance(message, generation_pb2.Rollout):
        arrays += [("token_entropies", rollout.token_entropies), ("sum_squared_probs", rollout.sum_squared_probs)]
    for name, array in arrays:
        if array is not None and array.shape != rollout.token_ids.shape:
            raise CodecError(
                join(path, name),
                f"has {array.size} elements for {rollout.token_ids.size} response tokens; required: one per token",
            )
    return rollout


def _encode_group(group: Group, kind: type[Any], path: str) -> Any:
    if kind is generation_pb2.StreamTrajectoriesResponse:
        prompt = vector(group.prompt_token_ids, join(path, "prompt_token_ids"), "int32")
        return encode_fields(group, kind, path, prompt_token_ids=prompt)
    more: dict[str, Any] = {}
    if kind is value_pb2.LabelledGroup:
        more = {
            "schema_version": LABEL_SCHEMA_VERSION,
            "run_id": group.run_id,
            "step": group.step,
            "num_rollouts": group.num_rollouts,
        }
    if kind is value_pb2.LabelledGroup or any(rollout.reward is not None for rollout in group.rollouts):
        more["rewards"] = _encode_rewards(group.rollouts, path)
    rollouts = enumerate(group.rollouts)
    return kind(
        group_id=group.group_id,
        domain=group.domain,
        prompt_id=group.prompt_id or _hash_of_prompt(group.prompt_token_ids),
        rollouts=[_encode_rollout_features(each, join(path, f"rollouts[{i}]")) for i, each in rollouts],
        **more,
    )


def _hash_of_prompt(token_ids: Ints) -> str:
    """Return 16 hexadecimal digits; empty without tokens."""
    return hashlib.blake2b(wire_bytes(token_ids), digest_size=8).hexdigest() if token_ids.size else ""


def _encode_rewards(rollouts: Sequence[Rollout], path: str) -> common_pb2.Tensor:
    rewards = [rollout.reward for rollout in rollouts]
    if None in rewards:
        field = join(path, f"rollouts[{rewards.index(None)}].reward")
        raise CodecError(field, "is None; set the reward of every rollout")
    return vector(np.array(rewards, np.float32), join(path, "rewards"))


def _decode_group(message: Any, path: str) -> Group:
    if isinstance(message, generation_pb2.StreamTrajectoriesResponse):
        prompt = from_tensor(message.prompt_token_ids, dtype="int32", field=join(path, "prompt_token_ids"))
        rollouts = tuple(
            _decode_rollout(rollout, join(path, f"rollouts[{i}]"), prompt_token_ids=prompt)
            for i, rollout in enumerate(message.rollouts)
        )
        return Group(message.group_id, rollouts)
    run_id, step, num_rollouts = "", 0, len(message.rollouts)
    if isinstance(message, value_pb2.LabelledGroup):
        if message.schema_version != LABEL_SCHEMA_VERSION:
            raise CodecError(
                join(path, "schema_version"), f"is {message.schema_version}; required: {LABEL_SCHEMA_VERSION}"
            )
        run_id, step, num_rollouts = message.run_id, message.step, message.num_rollouts
    rewards: Iterable[float | None] = [None] * len(message.rollouts)
    if message.HasField("rewards") or isinstance(message, value_pb2.LabelledGroup):
        read = from_tensor(message.rewards, field=join(path, "rewards"))
        if read.size != len(message.rollouts):
            raise CodecError(join(path, "rewards"), f"has {read.size} elements for {len(message.rollouts)} rollouts")
        rewards = read.tolist()
    rollouts = tuple(
        Rollout(
            id=RolloutId(run_id, step, message.group_id, index),
            features=_decode_features(features, join(path, f"rollouts[{index}]")),
            reward=reward,
            **_decode_tokens(features, join(path, f"rollouts[{index}].tokens")),
        )
        for index, (features, reward) in enumerate(zip(message.rollouts, rewards, strict=True))
    )
    return Group(message.group_id, rollouts, message.domain or DEFAULT_DOMAIN, num_rollouts, message.prompt_id)


def _decode_tokens(message: common_pb2.RolloutFeatures, path: str) -> dict[str, Any]:
    if not message.HasField("tokens"):
        return {}
    names = ("logprobs", "token_entropies", "sum_squared_probs")
    return dict(zip(names, decode_token_statistics(message.tokens, path), strict=True))


# Prompts.


def _encode_prompt(prompt: Prompt, kind: type[Any], path: str) -> generation_pb2.PromptSpec:
    content = prompt.content
    if isinstance(content, str):
        return generation_pb2.PromptSpec(group_id=prompt.group_id, text=content)
    items: Sequence[object] = list(content)
    if not items:
        raise CodecError(join(path, "content"), "is empty; required: text, at least one message or one token id")
    if all(isinstance(item, dict) and {"role", "content"} == item.keys() for item in items):
        turns = [
            generation_pb2.ChatMessage(
                role=cast(Any, enum_number(_ROLES, turn["role"], join(path, f"chat.messages[{i}].role"))),
                content=turn["content"],
            )
            for i, turn in enumerate(cast(Sequence[Message], items))
        ]
        return generation_pb2.PromptSpec(group_id=prompt.group_id, chat=generation_pb2.ChatPrompt(messages=turns))
    try:
        token_ids = [int(item.__index__()) for item in items]  # type: ignore[attr-defined]
        tokens = generation_pb2.TokenPrompt(token_ids=token_ids)
        return generation_pb2.PromptSpec(group_id=prompt.group_id, tokens=tokens)
    except (AttributeError, TypeError, ValueError) as error:
        raise CodecError(
            join(path, "content"),
            'required: text, messages of exactly "role" and "content", or token ids from 0 to 2^32 - 1',
        ) from error


def _decode_prompt(message: generation_pb2.PromptSpec, path: str) -> Prompt:
    match message.WhichOneof("prompt"):
        case "text":
            return Prompt(message.group_id, message.text)
        case "chat" if message.chat.messages:
            turns = [
                Message(role=enum_name(_ROLES, turn.role, join(path, f"chat.messages[{i}].role")), content=turn.content)
                for i, turn in enumerate(message.chat.messages)
            ]
            return Prompt(message.group_id, turns)
        case "tokens" if message.tokens.token_ids:
            return Prompt(message.group_id, list(message.tokens.token_ids))
        case None:
            raise CodecError(join(path, "prompt"), "is unset; required: text, chat or tokens")
        case kind:
            raise CodecError(join(path, kind), "is empty; required: at least one message or token id")


# Estimates, which are present or absent depending on their status.


def _encode_baselines(group: GroupBaselines, kind: type[Any], path: str) -> value_pb2.GroupBaselines:
    tokens = [vector(array, join(path, f"token_baselines[{i}]")) for i, array in enumerate(group.token_baselines or ())]
    status = _status_of(group.values)
    return encode_fields(group, value_pb2.GroupBaselines, path, status=status, token_baselines=tokens)


def _decode_baselines(message: value_pb2.GroupBaselines, path: str) -> GroupBaselines:
    if not _is_present(message.status, path):
        return GroupBaselines(message.group_id, 0, None, None, message.up_to_date)
    # A present estimate must have values, although the dataclass allows None.
    values = from_tensor(message.values, field=join(path, "values"))
    tokens = tuple(
        from_tensor(tensor, field=join(path, f"token_baselines[{i}]"))
        for i, tensor in enumerate(message.token_baselines)
    )
    group = decode_fields(message, GroupBaselines, path, values=values, token_baselines=tokens or None)
    for name, size in (
        ("baselines", len(values if group.baselines is None else group.baselines)),
        ("token_baselines", len(tokens or values)),
    ):
        if size != values.size:
            raise CodecError(join(path, name), f"has {size} elements for {values.size} values")
    return group


def _encode_score(score: PromptScore, kind: type[Any], path: str) -> value_pb2.PromptScore:
    return encode_fields(score, value_pb2.PromptScore, path, status=_status_of(score.value))


def _decode_score(message: value_pb2.PromptScore, path: str) -> PromptScore:
    if not _is_present(message.status, path):
        return PromptScore(message.group_id, 0, None)
    return decode_fields(message, PromptScore, path)


def _status_of(estimate: object) -> value_pb2.EstimateStatus.ValueType:
    return value_pb2.ESTIMATE_STATUS_NO_PROBE if estimate is None else value_pb2.ESTIMATE_STATUS_OK


def _is_present(status: int, path: str) -> bool:
    return enum_name(value_pb2.EstimateStatus.DESCRIPTOR, status, join(path, "status")) == "ok"


def _decode_prompt_features(message: value_pb2.PromptFeatures, path: str) -> PromptFeatures:
    return decode_fields(message, PromptFeatures, path, domain=message.domain or DEFAULT_DOMAIN)


# Batches and their results.


def _encode_batch(batch: Batch, kind: type[Any], path: str) -> learner_pb2.BatchHeader:
    return encode_fields(batch, learner_pb2.BatchHeader, path, num_rollouts=len(batch.rollouts))


def _encode_result(result: StepResult, kind: type[Any], path: str) -> learner_pb2.SubmitAdvantagesResponse:
    rejected = [
        learner_pb2.RejectedRollout(
            id=encode(rollout_id, common_pb2.RolloutId), reason=cast(Any, enum_number(_REASONS, reason, "rejected"))
        )
        for rollout_id, reason in result.rejected
    ]
    return encode_fields(result, learner_pb2.SubmitAdvantagesResponse, path, rejected=rejected)


def _decode_result(message: learner_pb2.SubmitAdvantagesResponse, path: str) -> StepResult:
    rejected = tuple(
        (decode(each.id, RolloutId), enum_name(_REASONS, each.reason, join(path, "rejected")))
        for each in message.rejected
    )
    return decode_fields(message, StepResult, path, rejected=rejected)


def _encode_status(status: LearnerStatus, kind: type[Any], path: str) -> learner_pb2.GetStatusResponse:
    counts = [
        learner_pb2.RejectionCount(reason=cast(Any, enum_number(_REASONS, reason, "num_rejected")), count=count)
        for reason, count in status.num_rejected.items()
    ]
    return encode_fields(status, learner_pb2.GetStatusResponse, path, num_rejected=counts)


def _decode_status(message: learner_pb2.GetStatusResponse, path: str) -> LearnerStatus:
    counts = {enum_name(_REASONS, each.reason, join(path, "num_rejected")): each.count for each in message.num_rejected}
    return decode_fields(message, LearnerStatus, path, num_rejected=counts)


# Process groups, for which the SDK has no type.


def backend_number(name: str) -> generation_pb2.ProcessGroupBackend.ValueType:
    """Return the number of a process-group backend. Raises `CodecError` if it is unknown."""
    return cast(generation_pb2.ProcessGroupBackend.ValueType, enum_number(_BACKENDS, name, "process_group.backend"))


def backend_name(number: int) -> str:
    """Return the name of a process-group backend; empty if it is unset or unknown."""
    return enum_name(_BACKENDS, number, "") if number in _BACKENDS.values_by_number and number else ""


register(Features, _encode_features, _decode_features)
register(Rollout, decoder=_decode_rollout)
register(Group, _encode_group, _decode_group)
register(Prompt, _encode_prompt, _decode_prompt)
register(GroupBaselines, _encode_baselines, _decode_baselines)
register(PromptScore, _encode_score, _decode_score)
register(PromptFeatures, decoder=_decode_prompt_features)
register(Batch, _encode_batch)
register(StepResult, _encode_result, _decode_result)
register(LearnerStatus, _encode_status, _decode_status)
