"""Messages of generation.proto: prompts, sampling, rollouts, groups, policies, pushes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from poise_client.codec._common import (
    decode_features,
    decode_rollout_id,
    decode_version_span,
    encode_features,
    encode_rollout_id,
    encode_version_span,
    join,
    vector,
)
from poise_client.codec._enums import backend_name, backend_number, enum_number, read_enum
from poise_client.codec._tensor import CodecError, from_tensor
from poise_client.types import (
    EncodedPrompt,
    FinishReason,
    Group,
    Message,
    Policy,
    Prompt,
    PromptCheck,
    Rollout,
    Sampling,
    WeightUpdate,
)
from poise_proto.v1 import common_pb2
from poise_proto.v1 import generation_pb2 as pb


def encode_prompt(prompt: Prompt, field: str = "prompt") -> pb.PromptSpec:
    """Pack a prompt.

    Raises:
        CodecError: content that is neither text, messages nor token ids; or an empty sequence.
    """
    content = prompt.content
    if isinstance(content, str):
        return pb.PromptSpec(group_id=prompt.group_id, text=content)
    items: Sequence[object] = list(content)
    if not items:
        raise CodecError(join(field, "content"), "is empty; required: text, at least one message or one token id")
    if all(isinstance(item, dict) and {"role", "content"} == item.keys() for item in items):
        turns = [_encode_turn(cast(Message, item), join(field, f"chat.messages[{i}]")) for i, item in enumerate(items)]
        return pb.PromptSpec(group_id=prompt.group_id, chat=pb.ChatPrompt(messages=turns))
    try:
        token_ids = [int(item.__index__()) for item in items]  # type: ignore[attr-defined]
        return pb.PromptSpec(group_id=prompt.group_id, tokens=pb.TokenPrompt(token_ids=token_ids))
    except (AttributeError, TypeError, ValueError) as error:
        raise CodecError(
            join(field, "content"),
            'required: text, messages of exactly "role" and "content", or token ids from 0 to 2^32 - 1',
        ) from error


def _encode_turn(turn: Message, field: str) -> pb.ChatMessage:
    role = enum_number(pb.ChatRole.DESCRIPTOR, turn["role"], join(field, "role"))
    return pb.ChatMessage(role=cast(pb.ChatRole.ValueType, role), content=turn["content"])


def decode_prompt(message: pb.PromptSpec, field: str = "prompt") -> Prompt:
    """Unpack a prompt. Raises `CodecError` when it asks nothing."""
    match message.WhichOneof("prompt"):
        case "text":
            return Prompt(message.group_id, message.text)
        case "chat" if message.chat.messages:
            turns = [
                Message(role=read_enum(turn, "role", join(field, f"chat.messages[{i}].role")), content=turn.content)
                for i, turn in enumerate(message.chat.messages)
            ]
            return Prompt(message.group_id, turns)
        case "tokens" if message.tokens.token_ids:
            return Prompt(message.group_id, list(message.tokens.token_ids))
        case None:
            raise CodecError(join(field, "prompt"), "is unset; required: text, chat or tokens")
        case kind:
            raise CodecError(join(field, kind), "is empty; required: at least one message or token id")


def encode_sampling(sampling: Sampling) -> pb.SamplingParams:
    """Pack sampling parameters."""
    return pb.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        stop=sampling.stop,
        seed=sampling.seed,
        stop_token_ids=sampling.stop_token_ids,
    )


def decode_sampling(message: pb.SamplingParams) -> Sampling:
    """Unpack sampling parameters; what is unset gets its default. Ranges are the servicer's to check."""
    return Sampling(
        temperature=message.temperature if message.HasField("temperature") else 1.0,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        top_k=message.top_k,
        max_tokens=message.max_tokens,
        stop=tuple(message.stop),
        seed=message.seed if message.HasField("seed") else None,
        stop_token_ids=tuple(message.stop_token_ids),
    )


def encode_rollout(rollout: Rollout, field: str = "rollout") -> pb.Rollout:
    """Pack a finished rollout."""
    entropies = rollout.token_entropies
    return pb.Rollout(
        id=encode_rollout_id(rollout.id),
        token_ids=vector(rollout.token_ids, join(field, "token_ids"), "int32"),
        logprobs=vector(rollout.logprobs, join(field, "logprobs")),
        token_entropies=None if entropies is None else vector(entropies, join(field, "token_entropies")),
        features=encode_features(rollout.features, join(field, "features")),
        version_spans=[encode_version_span(span) for span in rollout.version_spans],
        finish_reason=cast(
            common_pb2.FinishReason.ValueType,
            enum_number(common_pb2.FinishReason.DESCRIPTOR, rollout.finish_reason, join(field, "finish_reason")),
        ),
        text=rollout.text,
        first_token_s=rollout.first_token_s,
        total_s=rollout.total_s,
    )


def decode_rollout(message: pb.Rollout, field: str = "rollout") -> Rollout:
    """Unpack a finished rollout. Raises `CodecError` for anything missing or of mismatched length."""
    token_ids = from_tensor(message.token_ids, dtype="int32", field=join(field, "token_ids"))
    logprobs = from_tensor(message.logprobs, field=join(field, "logprobs"))
    entropies = None
    if message.HasField("token_entropies"):
        entropies = from_tensor(message.token_entropies, field=join(field, "token_entropies"))
    for name, array in (("logprobs", logprobs), ("token_entropies", entropies)):
        if array is not None and array.shape != token_ids.shape:
            raise CodecError(
                join(field, name), f"has {array.size} elements for {token_ids.size} tokens; required: one each"
            )
    return Rollout(
        id=decode_rollout_id(message.id),
        token_ids=token_ids,
        logprobs=logprobs,
        features=decode_features(message.features, join(field, "features")),
        version_spans=tuple(decode_version_span(span) for span in message.version_spans),
        finish_reason=cast(FinishReason, read_enum(message, "finish_reason", join(field, "finish_reason"))),
        text=message.text,
        token_entropies=entropies,
        first_token_s=message.first_token_s,
        total_s=message.total_s,
    )


def encode_group(group: Group, field: str = "group") -> pb.StreamTrajectoriesResponse:
    """Pack a finished group."""
    return pb.StreamTrajectoriesResponse(
        group_id=group.group_id,
        prompt_token_ids=vector(group.prompt_token_ids, join(field, "prompt_token_ids"), "int32"),
        rollouts=[encode_rollout(rollout, join(field, f"rollouts[{i}]")) for i, rollout in enumerate(group.rollouts)],
    )


def decode_group(message: pb.StreamTrajectoriesResponse, field: str = "group") -> Group:
    """Unpack a finished group."""
    return Group(
        message.group_id,
        from_tensor(message.prompt_token_ids, dtype="int32", field=join(field, "prompt_token_ids")),
        tuple(decode_rollout(rollout, join(field, f"rollouts[{i}]")) for i, rollout in enumerate(message.rollouts)),
    )


def encode_encoded_prompt(prompt: EncodedPrompt, field: str = "prompt") -> pb.EncodePromptsResponse:
    """Pack a prompt's state."""
    return pb.EncodePromptsResponse(
        group_id=prompt.group_id,
        num_prompt_tokens=prompt.num_prompt_tokens,
        prompt_hidden=vector(prompt.prompt_hidden, join(field, "prompt_hidden")),
        policy_version=prompt.policy_version,
    )


def decode_encoded_prompt(message: pb.EncodePromptsResponse, field: str = "prompt") -> EncodedPrompt:
    """Unpack a prompt's state."""
    return EncodedPrompt(
        message.group_id,
        message.num_prompt_tokens,
        from_tensor(message.prompt_hidden, field=join(field, "prompt_hidden")),
        message.policy_version,
    )


def encode_prompt_checks(checks: Sequence[PromptCheck]) -> pb.CheckPromptsResponse:
    """Pack what was found about prompts."""
    return pb.CheckPromptsResponse(
        prompts=[
            pb.PromptCheck(group_id=check.group_id, num_tokens=check.num_tokens, problem=check.problem)
            for check in checks
        ]
    )


def decode_prompt_checks(message: pb.CheckPromptsResponse) -> list[PromptCheck]:
    """Unpack what was found about prompts."""
    return [PromptCheck(check.group_id, check.num_tokens, check.problem) for check in message.prompts]


def encode_policy(policy: Policy) -> pb.GetPolicyResponse:
    """Pack what a replica serves."""
    return pb.GetPolicyResponse(
        instance_id=policy.instance_id,
        lineage_id=policy.lineage_id,
        policy_version=policy.policy_version,
        digest=policy.digest,
        ready=policy.ready,
        not_ready_reason=policy.not_ready_reason,
        engine=policy.engine,
        model=policy.model,
        hidden_size=policy.hidden_size,
        feature_layer=policy.feature_layer,
        max_model_len=policy.max_model_len,
        num_running=policy.num_running,
        keeps_base=policy.keeps_base,
        process_group_backend=backend_number(policy.process_group_backend, "process_group_backend"),
        tokenizer_digest=policy.tokenizer_digest,
        vocabulary_size=policy.vocabulary_size,
    )


def decode_policy(message: pb.GetPolicyResponse) -> Policy:
    """Unpack what a replica serves."""
    return Policy(
        instance_id=message.instance_id,
        lineage_id=message.lineage_id,
        policy_version=message.policy_version,
        digest=message.digest,
        ready=message.ready,
        not_ready_reason=message.not_ready_reason,
        engine=message.engine,
        model=message.model,
        hidden_size=message.hidden_size,
        feature_layer=message.feature_layer,
        max_model_len=message.max_model_len,
        num_running=message.num_running,
        keeps_base=message.keeps_base,
        process_group_backend=backend_name(message.process_group_backend),
        tokenizer_digest=message.tokenizer_digest,
        vocabulary_size=message.vocabulary_size,
    )


def encode_weight_update(update: WeightUpdate) -> pb.UpdateWeightsResponse:
    """Pack the outcome of a push."""
    return pb.UpdateWeightsResponse(
        policy_version=update.policy_version,
        already_applied=update.already_applied,
        receive_s=update.receive_s,
        pause_s=update.pause_s,
    )


def decode_weight_update(message: pb.UpdateWeightsResponse) -> WeightUpdate:
    """Unpack the outcome of a push."""
    return WeightUpdate(message.policy_version, message.already_applied, message.receive_s, message.pause_s)
