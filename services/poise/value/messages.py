"""Parses and checks messages. Requests and queue entries pass the same checks.

The estimator checks widths against a domain's window, because that needs its state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from poise.errors import InvalidRequest
from poise.runtime.rpc.validation import Violations, quoted
from poise.value.estimators.features import FeatureMatrix, Floats, GroupQuery, Halves, Label, TokenStatistics
from poise_client.codec import (
    LABEL_SCHEMA_VERSION,
    CodecError,
    decode,
    decode_hidden,
    decode_token_statistics,
    encode,
    from_tensor,
    to_tensor,
)
from poise_client.types import (
    DEFAULT_DOMAIN,
    EntropyStats,
    Estimator,
    Features,
    Group,
    PromptFeatures,
    Rollout,
    RolloutId,
)
from poise_proto.v1 import common_pb2, value_pb2

MAX_SIBLINGS = 1024
"""Maximum rollouts per group."""

_HIDDEN = (-1e7, 1e7)
"""Bounds of a hidden state: ten times what models produce. Larger values would dominate the fit."""

_ENTROPY = (-1e-3, 25.0)
"""Bounds of an entropy, nats: up to a uniform choice among e^25 tokens; below 0 only by rounding errors."""

_LOGPROB = (-80.0, 1e-3)
"""Bounds of a log-probability: above 0 only by rounding errors."""

_SUM_OF_SQUARES = (0.0, 1.001)
"""Bounds of the sum of squared probabilities."""

MAX_TOKENS = 2**22
"""Maximum tokens per request, over all rollouts."""

EstimatorOf = Callable[[str], Estimator]
"""Returns the estimator of a domain. It decides which inputs are read."""


def parse_label(payload: bytes, max_bytes: int, estimator_of: EstimatorOf) -> Label:
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
    label = read_label(message, "group", wrong, estimator_of)
    wrong.raise_if_any()
    assert label is not None, "a label without violations was parsed"  # noqa: S101
    return label


def read_label(
    message: value_pb2.LabelledGroup, path: str, wrong: Violations, estimator_of: EstimatorOf
) -> Label | None:
    """Parse a labelled group. If it is invalid, return None and add all violations to `wrong`."""
    if message.schema_version != LABEL_SCHEMA_VERSION:
        # The meaning of the other fields is unknown.
        wrong.add(f"{path}.schema_version", f"is {message.schema_version}; must be {LABEL_SCHEMA_VERSION}")
        return None
    domain = message.domain or DEFAULT_DOMAIN
    estimator = estimator_of(domain)
    wrong.identifier(f"{path}.run_id", message.run_id)
    wrong.identifier(f"{path}.group_id", message.group_id)
    wrong.identifier(f"{path}.domain", domain)
    wrong.check(
        len(message.rollouts) in (message.num_rollouts, *range(_min_rollouts(estimator))),  # too few: rejected below
        f"{path}.num_rollouts",
        f"is {message.num_rollouts}, but the message has {len(message.rollouts)} rollouts. Publish whole groups, with "
        "the number of sampled rollouts",
    )
    _read_prompt_id(message.prompt_id, path, wrong)
    features, tokens = _read_inputs(message.rollouts, path, domain, estimator, wrong)
    rewards = _read_rewards(message.rewards, len(message.rollouts), path, wrong)
    if features is None or rewards is None:
        return None
    return Label(message.run_id, message.step, message.group_id, domain, features, rewards, message.prompt_id, tokens)


def _min_rollouts(estimator: Estimator) -> int:
    """Return the least number of rollouts in a label. The probe's target is the mean reward of the others."""
    return 2 if estimator == "probe" else 1


def _read_prompt_id(prompt_id: str, path: str, wrong: Violations) -> None:
    if prompt_id:
        wrong.identifier(f"{path}.prompt_id", prompt_id)


def _read_inputs(
    messages: Sequence[common_pb2.RolloutFeatures], path: str, domain: str, estimator: Estimator, wrong: Violations
) -> tuple[FeatureMatrix | None, TokenStatistics | None]:
    """Parse what an estimator learns from. If it is invalid, return None twice and add all violations to `wrong`."""
    if estimator == "probe":
        siblings = _read_siblings(messages, path, wrong, at_least=_min_rollouts(estimator))
        features = None if siblings is None else _stack([siblings])
        if features is not None and not _are_in_bounds(features):
            _add_out_of_bounds(features, path, wrong)
            return None, None
        return features, None
    scored = _read_scored(messages, path, domain, estimator, wrong)
    if scored is None:
        return None, None
    if not _check_num_tokens(scored.tokens, f"{path}.rollouts", wrong):
        return None, None
    tokens = TokenStatistics.concatenate(scored.tokens)
    if not _are_tokens_in_bounds(tokens):
        _add_tokens_out_of_bounds(scored.tokens, path, wrong)
        return None, None
    return scored.features, tokens


def label_payload(label: Label) -> bytes:
    """Return the queue entry of a label: the inverse of `parse_label`.

    Of a learnt label for a score-weighted estimator, the tokens are no longer known, so the entry lacks the rollouts.
    """
    if label.moments is not None:
        return value_pb2.LabelledGroup(
            schema_version=LABEL_SCHEMA_VERSION,
            run_id=label.run_id,
            step=label.step,
            group_id=label.group_id,
            domain=label.domain,
            rewards=to_tensor(label.rewards),
            num_rollouts=label.rewards.size,
            prompt_id=label.prompt_id,
        ).SerializeToString()
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


def read_queries(
    messages: Sequence[value_pb2.GroupFeatures], wrong: Violations, estimator_of: EstimatorOf
) -> list[GroupQuery | None]:
    """Parse each group, with its rewards if given; None for groups with invalid features.

    Rows of many groups are checked together: this takes half the time of checking each group.
    """
    queries: list[GroupQuery | None] = [None] * len(messages)
    stacked: dict[int, list[tuple[int, _Siblings, Floats | None]]] = {}
    scored: list[tuple[int, _Scored, Floats | None]] = []
    for index, message in enumerate(messages):
        if wrong.is_full:
            break
        path, rewards, domain = f"groups[{index}]", None, message.domain or DEFAULT_DOMAIN
        _read_prompt_id(message.prompt_id, path, wrong)
        estimator = estimator_of(domain)
        siblings = scores = None
        if estimator == "probe":
            siblings = _read_siblings(message.rollouts, path, wrong)
        else:
            scores = _read_scored(message.rollouts, path, domain, estimator, wrong)
        if message.HasField("rewards"):
            rewards = _read_rewards(message.rewards, len(message.rollouts), path, wrong)
        if siblings is not None:
            stacked.setdefault(siblings.width, []).append((index, siblings, rewards))
        if scores is not None:
            scored.append((index, scores, rewards))

    def add(index: int, features: FeatureMatrix, tokens: TokenStatistics | None = None) -> None:
        message = messages[index]
        domain = message.domain or DEFAULT_DOMAIN
        queries[index] = GroupQuery(message.group_id, domain, features, tokens, message.prompt_id)

    for groups in stacked.values():
        all_features = _stack([siblings for _, siblings, _ in groups])
        are_all_in_bounds = _are_in_bounds(all_features)
        start = 0
        for index, siblings, rewards in groups:
            features = all_features.part(start, start + len(siblings), rewards)
            start += len(siblings)
            if are_all_in_bounds or _are_in_bounds(features):
                add(index, features)
            else:
                _add_out_of_bounds(features, f"groups[{index}]", wrong)
    parts = [part for _, scores, _ in scored for part in scores.tokens]
    if not _check_num_tokens(parts, "groups", wrong):
        return queries
    are_all_in_bounds = not parts or _are_tokens_in_bounds(TokenStatistics.concatenate(parts))
    for index, scores, _ in scored:
        tokens = TokenStatistics.concatenate(scores.tokens)
        if are_all_in_bounds or _are_tokens_in_bounds(tokens):
            add(index, scores.features, tokens)
        else:
            _add_tokens_out_of_bounds(scores.tokens, f"groups[{index}]", wrong)
    return queries


@dataclass(frozen=True, slots=True)
class _Scored:
    """The inputs of score-weighted estimators of one group."""

    features: FeatureMatrix
    """See `Label.features`."""
    tokens: list[TokenStatistics]
    """Of each rollout."""


def _read_scored(
    messages: Sequence[common_pb2.RolloutFeatures], path: str, domain: str, estimator: Estimator, wrong: Violations
) -> _Scored | None:
    """Parse token statistics and, if the estimator uses it, the prompt's hidden state.

    Does not check the bounds of tokens. If something is malformed, return None and add all violations to `wrong`.
    """
    if not _check_num_rollouts(len(messages), path, wrong):
        return None
    tokens: list[TokenStatistics] = []
    for index, message in enumerate(messages):
        field = f"{path}.rollouts[{index}].tokens"
        if not message.HasField("tokens"):
            wrong.add(
                field,
                f"is unset, but the estimator of domain {quoted(domain)} is {estimator}. Send the log-probabilities, "
                "entropies and sums of squared probabilities that the generation service returned",
            )
            continue
        try:
            arrays = decode_token_statistics(message.tokens, field)
        except CodecError as error:
            wrong.add(error.field, error.description)
            continue
        tokens.append(TokenStatistics(*arrays, (arrays[0].size,)))
    prompt_hidden: Floats | None = np.zeros(0, np.float32)
    if estimator in ("score_prompt", "auto"):
        prompt_hidden = _read_prompt_hidden(messages[0].prompt_hidden, f"{path}.rollouts[0].prompt_hidden", wrong)
    if prompt_hidden is None or len(tokens) < len(messages):
        return None
    nothing = np.zeros((len(messages), 0), np.float32)
    return _Scored(FeatureMatrix(prompt_hidden[None], nothing, nothing), tokens)


def _read_prompt_hidden(message: common_pb2.Tensor, field: str, wrong: Violations) -> Floats | None:
    try:
        prompt_hidden = from_tensor(message, field=field)
    except CodecError as error:
        wrong.add(error.field, error.description)
        return None
    if not prompt_hidden.size:
        wrong.add(field, "is empty; it must have the model's width")
    elif not _are_within(prompt_hidden, _HIDDEN):
        wrong.add(field, _describe_out_of_bounds(prompt_hidden, _HIDDEN))
    else:
        return prompt_hidden
    return None


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
    if not _check_num_rollouts(len(messages), path, wrong, at_least):
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


def _check_num_rollouts(number: int, path: str, wrong: Violations, at_least: int = 1) -> bool:
    remedy = ""
    if number == 1 < at_least:
        remedy = (
            ": the probe learns from siblings. Set rollouts_per_prompt to 2 or more, or value.estimator to a "
            "score-weighted one"
        )
    return wrong.check(
        number >= at_least, f"{path}.rollouts", f"has {number} rollouts; at least {at_least} are needed{remedy}"
    ) and wrong.check(
        number <= MAX_SIBLINGS, f"{path}.rollouts", f"has {number} rollouts; at most {MAX_SIBLINGS} are accepted"
    )


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
    _read_prompt_hidden(message.prompt_hidden, f"{path}.prompt_hidden", wrong)
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


def _are_within(columns: Floats | Halves, bounds: tuple[float, float]) -> bool:
    """Whether all numbers are within the bounds; NaN is not."""
    return bool(columns.min() >= bounds[0] and columns.max() <= bounds[1]) if columns.size else True


def _check_num_tokens(rollouts: Sequence[TokenStatistics], field: str, wrong: Violations) -> bool:
    number = sum(tokens.logprobs.size for tokens in rollouts)
    return wrong.check(
        number <= MAX_TOKENS, field, f"have {number} tokens; at most {MAX_TOKENS} are accepted. Send them in parts"
    )


def _token_columns(tokens: TokenStatistics) -> tuple[tuple[str, Floats | Halves, tuple[float, float]], ...]:
    return (
        ("logprobs", tokens.logprobs, _LOGPROB),
        ("entropies", tokens.entropies, _ENTROPY),
        ("sum_squared_probs", tokens.sum_squared_probs, _SUM_OF_SQUARES),
    )


def _are_tokens_in_bounds(tokens: TokenStatistics) -> bool:
    return all(_are_within(numbers, bounds) for _, numbers, bounds in _token_columns(tokens))


def _add_tokens_out_of_bounds(rollouts: Sequence[TokenStatistics], path: str, wrong: Violations) -> None:
    for index, tokens in enumerate(rollouts):
        for name, numbers, bounds in _token_columns(tokens):
            if not _are_within(numbers, bounds):
                field = f"{path}.rollouts[{index}].tokens.{name}"
                wrong.add(field, _describe_out_of_bounds(numbers, bounds))


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


def _describe_out_of_bounds(numbers: Floats | Halves, bounds: tuple[float, float]) -> str:
    if not np.isfinite(numbers).all():
        return "contains NaN or infinite numbers"
    worst = numbers.max() if numbers.max() > bounds[1] else numbers.min()
    return f"contains {worst:g}; allowed: {bounds[0]:g} to {bounds[1]:g}"
