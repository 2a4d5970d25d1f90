"""From the wire to matrices, with every check a label or a question must pass. The same for callers and for the queue.

Owns the translation and the rules; knows no state, so widths against a domain's window are the estimator's to judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from google.protobuf.message import DecodeError

from poise.errors import InvalidRequest
from poise.runtime.validation import Violations
from poise.value.rows import FeatureRows, Floats, LabelledRows
from poise_client.codec import (
    DEFAULT_DOMAIN,
    LABEL_SCHEMA_VERSION,
    CodecError,
    decode_features,
    decode_prompt_features,
    from_tensor,
)
from poise_client.types import EntropyStats, Features, PromptFeatures
from poise_proto.v1 import common_pb2, value_pb2

MIN_SIBLINGS = 2
"""Fewer rollouts give no reward of others to learn."""


def parse_label(payload: bytes, max_bytes: int) -> LabelledRows:
    """Read a queue entry.

    Raises:
        InvalidRequest: it is poison, and why.
    """
    if len(payload) > max_bytes:
        raise InvalidRequest.field("payload", f"{len(payload)} bytes; at most {max_bytes} are accepted")
    try:
        message = value_pb2.LabelledGroup.FromString(payload)
    except DecodeError as error:
        raise InvalidRequest.field("payload", f"is not a LabelledGroup message: {error}") from error
    wrong = Violations()
    label = read_label(message, "group", wrong)
    wrong.raise_if_any()
    assert label is not None, "a label without violations was read"  # noqa: S101
    return label


def read_label(message: value_pb2.LabelledGroup, path: str, wrong: Violations) -> LabelledRows | None:
    """Read a labelled group; None when something in it is wrong, all of which `wrong` then holds."""
    if message.schema_version != LABEL_SCHEMA_VERSION:
        # Nothing else of another schema can be judged.
        wrong.add(f"{path}.schema_version", f"is {message.schema_version}; must be {LABEL_SCHEMA_VERSION}")
        return None
    domain = message.domain or DEFAULT_DOMAIN
    wrong.identifier(f"{path}.run_id", message.run_id)
    wrong.identifier(f"{path}.group_id", message.group_id)
    wrong.identifier(f"{path}.domain", domain)
    wrong.check(
        len(message.rollouts) in (0, 1, message.num_rollouts),  # fewer than two are told of below
        f"{path}.num_rollouts",
        f"is {message.num_rollouts}, and {len(message.rollouts)} rollouts are here; publish whole groups, with the "
        "number that was sampled",
    )
    rows = read_rollouts(message.rollouts, path, wrong, at_least=MIN_SIBLINGS)
    rewards = _read_rewards(message.rewards, len(message.rollouts), path, wrong)
    if rows is None or rewards is None:
        return None
    return LabelledRows(message.run_id, message.step, message.group_id, domain, rows, rewards)


def read_question(message: value_pb2.GroupFeatures, path: str, wrong: Violations) -> FeatureRows | None:
    """Read the siblings' features, and their rewards where given; None when something in them is wrong."""
    rows = read_rollouts(message.rollouts, path, wrong)
    if not message.HasField("rewards"):
        return rows
    rewards = _read_rewards(message.rewards, len(message.rollouts), path, wrong)
    return None if rows is None or rewards is None else replace(rows, rewards=rewards)


def _read_rewards(message: common_pb2.Tensor, num_rollouts: int, path: str, wrong: Violations) -> Floats | None:
    field = f"{path}.rewards"
    try:
        rewards = from_tensor(message, field=field)
    except CodecError as error:
        wrong.add(error.field, error.description)
        return None
    if rewards.size != num_rollouts:
        wrong.add(field, f"has {rewards.size} elements for {num_rollouts} rollouts")
    elif not (np.isfinite(rewards) & (rewards >= 0) & (rewards <= 1)).all():
        wrong.add(field, "must lie in [0, 1]; scale the rewards before sending them")
    else:
        return rewards
    return None


def read_rollouts(
    messages: Sequence[common_pb2.RolloutFeatures], path: str, wrong: Violations, *, at_least: int = 1
) -> FeatureRows | None:
    """Read the siblings' features; None when something in them is wrong, all of which `wrong` then holds."""
    if len(messages) < at_least:
        wrong.add(f"{path}.rollouts", f"has {len(messages)} rollouts; at least {at_least} are needed")
        return None
    decoded = []
    for index, message in enumerate(messages):
        field = f"{path}.rollouts[{index}]"
        try:
            decoded.append(decode_features(message, field))
        except CodecError as error:
            wrong.add(error.field, error.description)
    if len(decoded) < len(messages):
        return None
    widths = {features.prompt_hidden.size for features in decoded}
    if len(widths) > 1 or not min(widths):
        wrong.add(f"{path}.rollouts", f"hidden states have widths {sorted(widths)}; all must have the model's width")
        return None
    rows = FeatureRows(
        np.stack([features.prompt_hidden for features in decoded]),
        np.stack([features.response_hidden for features in decoded]),
        np.array([_entropies(features) for features in decoded], np.float32),
    )
    return rows if _check_finite(rows, path, wrong) else None


def read_prompt(message: value_pb2.PromptFeatures, path: str, wrong: Violations) -> PromptFeatures | None:
    """Read a prompt that is to be valued; None when something in it is wrong, all of which `wrong` then holds."""
    wrong.identifier(f"{path}.group_id", message.group_id)
    wrong.identifier(f"{path}.domain", message.domain or DEFAULT_DOMAIN)
    try:
        prompt = decode_prompt_features(message, path)
    except CodecError as error:
        wrong.add(error.field, error.description)
        return None
    if not prompt.prompt_hidden.size:
        wrong.add(f"{path}.prompt_hidden", "is empty; must have the model's width")
    elif not np.isfinite(prompt.prompt_hidden).all():
        wrong.add(f"{path}.prompt_hidden", "holds NaN or infinite numbers")
    return prompt


_ENTROPIES = tuple(
    f"{span}_entropy.{statistic}"
    for span in ("output", "reasoning", "answer")
    for statistic in ("mean", "last", "max", "min")
)
"""The fields behind the columns of `FeatureRows.entropies`."""


def _entropies(features: Features) -> list[float]:
    stats: tuple[EntropyStats, ...] = (
        features.output_entropy,
        features.reasoning_entropy,
        features.answer_entropy,
    )
    return [value for each in stats for value in (each.mean, each.last, each.max, each.min)]


def _check_finite(rows: FeatureRows, path: str, wrong: Violations) -> bool:
    if all(np.isfinite(columns).all() for columns in (rows.prompt_hidden, rows.response_hidden, rows.entropies)):
        return True
    for name, columns in (
        ("prompt_hidden", rows.prompt_hidden),
        ("response_hidden", rows.response_hidden),
        *((name, rows.entropies[:, [column]]) for column, name in enumerate(_ENTROPIES)),
    ):
        for index in np.flatnonzero(~np.isfinite(columns).all(axis=1)):
            wrong.add(f"{path}.rollouts[{index}].{name}", "holds NaN or infinite numbers")
    return False
