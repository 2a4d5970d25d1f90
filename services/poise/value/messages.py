"""Parses and checks messages. Requests and queue entries pass the same checks.

The estimator checks widths against a domain's window, because that needs its state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from poise.errors import InvalidRequest
from poise.runtime.rpc.validation import Violations, quoted
from poise.value.probe.features import FeatureMatrix, Floats, Label
from poise_client.codec import (
    LABEL_SCHEMA_VERSION,
    CodecError,
    decode,
    decode_hidden,
    encode,
    from_tensor,
)
from poise_client.types import DEFAULT_DOMAIN, EntropyStats, Features, Group, PromptFeatures, Rollout, RolloutId
from poise_proto.v1 import common_pb2, value_pb2

MIN_SIBLINGS = 2
"""A label needs at least two rollouts: the target is the mean reward of the others."""

MAX_SIBLINGS = 1024
"""Maximum rollouts per group."""

_HIDDEN = (-1e7, 1e7)
"""Bounds of a hidden state: ten times what models produce. Larger values would dominate the fit."""

_ENTROPY = (-1e-3, 25.0)
"""Bounds of an entropy, nats: up to a uniform choice among e^25 tokens; below 0 only by rounding errors."""


def parse_label(payload: bytes, max_bytes: int) -> Label:
    """Parse a queue entry.

    Raises:
        InvalidRequest: the entry is invalid.
    """
    if len(payload) > max_bytes:
        raise InvalidRequest.field("payload", f"is {len(payload)} bytes; at most {max_bytes} are accepted")
    try:
        message = value_pb2.LabelledGroup.FromString(payload)
    except DecodeError as error:
        raise InvalidRequest.field("payload", f"is not a LabelledGroup message: {error}") from error
    wrong = Violations()
    label = read_label(message, "group", wrong)
    wrong.raise_if_any()
    assert label is not None, "a label without violations was parsed"  # noqa: S101
    return label


def read_label(message: value_pb2.LabelledGroup, path: str, wrong: Violations) -> Label | None:
    """Parse a labelled group. If it is invalid, return None and add all violations to `wrong`."""
    if message.schema_version != LABEL_SCHEMA_VERSION:
        # The meaning of the other fields is unknown.
        wrong.add(f"{path}.schema_version", f"is {message.schema_version}; must be {LABEL_SCHEMA_VERSION}")
        return None
    domain = message.domain or DEFAULT_DOMAIN
    wrong.identifier(f"{path}.run_id", message.run_id)
    wrong.identifier(f"{path}.group_id", message.group_id)
    wrong.identifier(f"{path}.domain", domain)
    wrong.check(
        len(message.rollouts) in (0, 1, message.num_rollouts),  # fewer than two are rejected below
        f"{path}.num_rollouts",
        f"is {message.num_rollouts}, but the message has {len(message.rollouts)} rollouts. Publish whole groups, with "
        "the number of sampled rollouts",
    )
    siblings = _read_siblings(message.rollouts, path, wrong, at_least=MIN_SIBLINGS)
    features = None if siblings is None else _stack([siblings])
    if features is not None and not _are_in_bounds(features):
        _add_out_of_bounds(features, path, wrong)
        features = None
    rewards = _read_rewards(message.rewards, len(message.rollouts), path, wrong)
    if features is None or rewards is None:
        return None
    return Label(message.run_id, message.step, message.group_id, domain, features, rewards)


def label_payload(label: Label) -> bytes:
    """Return the queue entry of a label: the inverse of `parse_label`."""
    features, ids = label.features, (label.run_id, label.step, label.group_id)
    rollouts = tuple(
        Rollout(
            id=RolloutId(*ids, index),
            features=Features(prompt, response, *(EntropyStats(*entropies[i : i + 4].tolist()) for i in (0, 4, 8))),
            reward=reward,
        )
        for index, (prompt, response, entropies, reward) in enumerate(
            zip(
                features.prompt_hidden,
                features.response_hidden,
                features.entropies,
                label.rewards.tolist(),
                strict=True,
            )
        )
    )
    group = Group(label.group_id, rollouts, label.domain)
    return encode(group, value_pb2.LabelledGroup).SerializeToString()


def read_queries(messages: Sequence[value_pb2.GroupFeatures], wrong: Violations) -> list[FeatureMatrix | None]:
    """Parse each group's features, and its rewards if given; None for groups with invalid features.

    Groups of one width are stacked into one matrix: checking it takes half the time of checking each group.
    """
    read: dict[int, list[tuple[int, _Siblings, Floats | None]]] = {}
    for index, message in enumerate(messages):
        if wrong.is_full:
            break
        path = f"groups[{index}]"
        siblings, rewards = _read_siblings(message.rollouts, path, wrong), None
        if message.HasField("rewards"):
            rewards = _read_rewards(message.rewards, len(message.rollouts), path, wrong)
        if siblings is not None:
            read.setdefault(siblings.width, []).append((index, siblings, rewards))
    queries: list[FeatureMatrix | None] = [None] * len(messages)
    for groups in read.values():
        all_features = _stack([siblings for _, siblings, _ in groups])
        are_all_in_bounds = _are_in_bounds(all_features)
        start = 0
        for index, siblings, rewards in groups:
            features = all_features.part(start, start + len(siblings), rewards)
            start += len(siblings)
            if are_all_in_bounds or _are_in_bounds(features):
                queries[index] = features
            else:
                _add_out_of_bounds(features, f"groups[{index}]", wrong)
    return queries


def _read_rewards(message: common_pb2.Tensor, num_rollouts: int, path: str, wrong: Violations) -> Floats | None:
    field = f"{path}.rewards"
    try:
        rewards = from_tensor(message, field=field)
    except CodecError as error:
        wrong.add(error.field, error.description)
        return None
    if rewards.size != num_rollouts:
        wrong.add(field, f"has {rewards.size} elements; the group has {num_rollouts} rollouts")
    elif not all(0 <= reward <= 1 for reward in rewards.tolist()):  # also rejects NaN
        wrong.add(field, "must be in [0, 1]; scale the rewards before sending them")
    else:
        return rewards
    return None


@dataclass(frozen=True, slots=True)
class _Siblings:
    """The features of a group's rollouts, at least one, before they are stacked."""

    prompt_hidden: list[Floats]
    """[d] each, all of one width."""
    response_hidden: list[Floats]
    entropies: list[list[float]]
    """The columns of `FeatureMatrix.entropies`, per rollout."""

    def __len__(self) -> int:
        return len(self.entropies)

    @property
    def width(self) -> int:
        return self.prompt_hidden[0].size


def _read_siblings(
    messages: Sequence[common_pb2.RolloutFeatures], path: str, wrong: Violations, *, at_least: int = 1
) -> _Siblings | None:
    """Parse the siblings' features. If one is malformed, return None and add all violations to `wrong`."""
    if len(messages) < at_least:
        wrong.add(f"{path}.rollouts", f"has {len(messages)} rollouts; at least {at_least} are needed")
        return None
    if len(messages) > MAX_SIBLINGS:
        wrong.add(f"{path}.rollouts", f"has {len(messages)} rollouts; at most {MAX_SIBLINGS} are accepted")
        return None
    siblings = _Siblings([], [], [])
    for index, message in enumerate(messages):
        try:
            prompt_hidden, response_hidden = decode_hidden(message, f"{path}.rollouts[{index}]")
        except CodecError as error:
            wrong.add(error.field, error.description)
            continue
        siblings.prompt_hidden.append(prompt_hidden)
        siblings.response_hidden.append(response_hidden)
        siblings.entropies.append(_entropies(message))
    if len(siblings) < len(messages):
        return None
    widths = {prompt_hidden.size for prompt_hidden in siblings.prompt_hidden}
    if len(widths) > 1 or not siblings.width:
        wrong.add(
            f"{path}.rollouts",
            f"hidden states have widths {quoted(sorted(widths))}; all must have the same width, above 0",
        )
        return None
    return siblings


def _stack(groups: Sequence[_Siblings]) -> FeatureMatrix:
    """Stack the rows of groups of one width."""
    shape = sum(map(len, groups)), groups[0].width
    return FeatureMatrix(
        np.concatenate([state for group in groups for state in group.prompt_hidden]).reshape(shape),
        np.concatenate([state for group in groups for state in group.response_hidden]).reshape(shape),
        np.array([values for group in groups for values in group.entropies], np.float32),
    )


def read_prompt(message: value_pb2.PromptFeatures, path: str, wrong: Violations) -> PromptFeatures | None:
    """Parse a prompt to be scored. If it is invalid, return None and add all violations to `wrong`."""
    wrong.identifier(f"{path}.group_id", message.group_id)
    wrong.identifier(f"{path}.domain", message.domain or DEFAULT_DOMAIN)
    try:
        prompt = decode(message, PromptFeatures, path)
    except CodecError as error:
        wrong.add(error.field, error.description)
        return None
    if not prompt.prompt_hidden.size:
        wrong.add(f"{path}.prompt_hidden", "is empty; it must have the model's width")
    elif not _are_within(prompt.prompt_hidden, _HIDDEN):
        wrong.add(f"{path}.prompt_hidden", _describe_out_of_bounds(prompt.prompt_hidden, _HIDDEN))
    return prompt


_ENTROPIES = tuple(
    f"{span}_entropy.{statistic}"
    for span in ("output", "reasoning", "answer")
    for statistic in ("mean", "last", "max", "min")
)
"""The field of each column of `FeatureMatrix.entropies`."""


def _entropies(message: common_pb2.RolloutFeatures) -> list[float]:
    spans = (message.output_entropy, message.reasoning_entropy, message.answer_entropy)
    return [value for span in spans for value in (span.mean, span.last, span.max, span.min)]


def _are_in_bounds(features: FeatureMatrix) -> bool:
    return (
        _are_within(features.prompt_hidden, _HIDDEN)
        and _are_within(features.response_hidden, _HIDDEN)
        and _are_within(features.entropies, _ENTROPY)
    )


def _are_within(columns: Floats, bounds: tuple[float, float]) -> bool:
    """Whether all numbers are within the bounds; NaN is not."""
    return bool(columns.min() >= bounds[0] and columns.max() <= bounds[1]) if columns.size else True


def _add_out_of_bounds(features: FeatureMatrix, path: str, wrong: Violations) -> None:
    """Add a violation for every field of these rollouts whose numbers are out of bounds."""
    for name, columns, bounds in (
        ("prompt_hidden", features.prompt_hidden, _HIDDEN),
        ("response_hidden", features.response_hidden, _HIDDEN),
        *((name, features.entropies[:, [column]], _ENTROPY) for column, name in enumerate(_ENTROPIES)),
    ):
        for index, row in enumerate(columns):
            if not _are_within(row, bounds):
                wrong.add(f"{path}.rollouts[{index}].{name}", _describe_out_of_bounds(row, bounds))


def _describe_out_of_bounds(numbers: Floats, bounds: tuple[float, float]) -> str:
    if not np.isfinite(numbers).all():
        return "contains NaN or infinite numbers"
    worst = numbers.max() if numbers.max() > bounds[1] else numbers.min()
    return f"contains {worst:g}; allowed: {bounds[0]:g} to {bounds[1]:g}"
