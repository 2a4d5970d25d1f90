"""From the wire to matrices, with every check a label or a question must pass. The same for callers and for the queue.

Owns the translation and the rules; knows no state, so widths against a domain's window are the estimator's to judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from poise.errors import InvalidRequest
from poise.runtime.rpc.validation import Violations, quoted
from poise.value.probe.features import FeatureRows, Floats, LabelledRows
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
"""Fewer rollouts give no reward of others to learn."""


MAX_SIBLINGS = 1024
"""Most rollouts of a group."""
_HIDDEN = (-1e7, 1e7)
"""Bounds of a hidden state: ten times what models produce. Squares of larger numbers swamp those of all other rows."""
_ENTROPY = (-1e-3, 25.0)
"""Bounds of an entropy, nats: up to a uniform choice among e^25 tokens; below 0 only by rounding."""


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
        len(message.rollouts) in (0, 1, message.num_rollouts),  # fewer than two are reported below
        f"{path}.num_rollouts",
        f"is {message.num_rollouts}, and {len(message.rollouts)} rollouts are here; publish whole groups, with the "
        "number that was sampled",
    )
    siblings = _read_siblings(message.rollouts, path, wrong, at_least=MIN_SIBLINGS)
    rows = None if siblings is None else _stack([siblings])
    if rows is not None and not _can_be_fitted(rows):
        _name_unfit(rows, path, wrong)
        rows = None
    rewards = _read_rewards(message.rewards, len(message.rollouts), path, wrong)
    if rows is None or rewards is None:
        return None
    return LabelledRows(message.run_id, message.step, message.group_id, domain, rows, rewards)


def label_payload(label: LabelledRows) -> bytes:
    """Return the queue entry that `parse_label` reads as this label."""
    rows, ids = label.rows, (label.run_id, label.step, label.group_id)
    rollouts = tuple(
        Rollout(
            id=RolloutId(*ids, index),
            features=Features(prompt, response, *(EntropyStats(*entropies[i : i + 4].tolist()) for i in (0, 4, 8))),
            reward=reward,
        )
        for index, (prompt, response, entropies, reward) in enumerate(
            zip(rows.prompt_hidden, rows.response_hidden, rows.entropies, label.rewards.tolist(), strict=True)
        )
    )
    group = Group(label.group_id, rollouts, label.domain)
    return encode(group, value_pb2.LabelledGroup).SerializeToString()


def read_questions(messages: Sequence[value_pb2.GroupFeatures], wrong: Violations) -> list[FeatureRows | None]:
    """Read each group's features, and its rewards where given; None where the features are wrong.

    Groups of one width get parts of the same matrices: a few passes over all rows take half the time of some over each
    group's.
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
    questions: list[FeatureRows | None] = [None] * len(messages)
    for groups in read.values():
        all_rows = _stack([siblings for _, siblings, _ in groups])
        are_all_fit = _can_be_fitted(all_rows)
        start = 0
        for index, siblings, rewards in groups:
            rows = all_rows.part(start, start + len(siblings), rewards)
            start += len(siblings)
            if are_all_fit or _can_be_fitted(rows):
                questions[index] = rows
            else:
                _name_unfit(rows, f"groups[{index}]", wrong)
    return questions


def _read_rewards(message: common_pb2.Tensor, num_rollouts: int, path: str, wrong: Violations) -> Floats | None:
    field = f"{path}.rewards"
    try:
        rewards = from_tensor(message, field=field)
    except CodecError as error:
        wrong.add(error.field, error.description)
        return None
    if rewards.size != num_rollouts:
        wrong.add(field, f"has {rewards.size} elements for {num_rollouts} rollouts")
    elif not all(0 <= reward <= 1 for reward in rewards.tolist()):  # so NaN is refused too
        wrong.add(field, "must lie in [0, 1]; scale the rewards before sending them")
    else:
        return rewards
    return None


@dataclass(frozen=True, slots=True)
class _Siblings:
    """The features of a group's rollouts, at least one, as they came."""

    prompt_hidden: list[Floats]
    """Each [d], all of one width."""
    response_hidden: list[Floats]
    entropies: list[list[float]]
    """Of each rollout, the columns of `FeatureRows.entropies`."""

    def __len__(self) -> int:
        return len(self.entropies)

    @property
    def width(self) -> int:
        return self.prompt_hidden[0].size


def _read_siblings(
    messages: Sequence[common_pb2.RolloutFeatures], path: str, wrong: Violations, *, at_least: int = 1
) -> _Siblings | None:
    """Read the siblings' features; None when their form is wrong, in all the ways that `wrong` then holds."""
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
            f"{path}.rollouts", f"hidden states have widths {quoted(sorted(widths))}; all must have the model's width"
        )
        return None
    return siblings


def _stack(groups: Sequence[_Siblings]) -> FeatureRows:
    """Return the rows of groups of one width, one after the other."""
    shape = sum(map(len, groups)), groups[0].width
    return FeatureRows(
        np.concatenate([state for group in groups for state in group.prompt_hidden]).reshape(shape),
        np.concatenate([state for group in groups for state in group.response_hidden]).reshape(shape),
        np.array([values for group in groups for values in group.entropies], np.float32),
    )


def read_prompt(message: value_pb2.PromptFeatures, path: str, wrong: Violations) -> PromptFeatures | None:
    """Read a prompt that is to be valued; None when something in it is wrong, all of which `wrong` then holds."""
    wrong.identifier(f"{path}.group_id", message.group_id)
    wrong.identifier(f"{path}.domain", message.domain or DEFAULT_DOMAIN)
    try:
        prompt = decode(message, PromptFeatures, path)
    except CodecError as error:
        wrong.add(error.field, error.description)
        return None
    if not prompt.prompt_hidden.size:
        wrong.add(f"{path}.prompt_hidden", "is empty; must have the model's width")
    elif not _lie_within(prompt.prompt_hidden, _HIDDEN):
        wrong.add(f"{path}.prompt_hidden", _what_is_unfit(prompt.prompt_hidden, _HIDDEN))
    return prompt


_ENTROPIES = tuple(
    f"{span}_entropy.{statistic}"
    for span in ("output", "reasoning", "answer")
    for statistic in ("mean", "last", "max", "min")
)
"""The fields behind the columns of `FeatureRows.entropies`."""


def _entropies(message: common_pb2.RolloutFeatures) -> list[float]:
    spans = (message.output_entropy, message.reasoning_entropy, message.answer_entropy)
    return [value for span in spans for value in (span.mean, span.last, span.max, span.min)]


def _can_be_fitted(rows: FeatureRows) -> bool:
    return (
        _lie_within(rows.prompt_hidden, _HIDDEN)
        and _lie_within(rows.response_hidden, _HIDDEN)
        and _lie_within(rows.entropies, _ENTROPY)
    )


def _lie_within(columns: Floats, bounds: tuple[float, float]) -> bool:
    """Whether all numbers lie within the bounds; NaN does not."""
    return bool(columns.min() >= bounds[0] and columns.max() <= bounds[1]) if columns.size else True


def _name_unfit(rows: FeatureRows, path: str, wrong: Violations) -> None:
    """Note every field of these rollouts whose numbers are out of bounds."""
    for name, columns, bounds in (
        ("prompt_hidden", rows.prompt_hidden, _HIDDEN),
        ("response_hidden", rows.response_hidden, _HIDDEN),
        *((name, rows.entropies[:, [column]], _ENTROPY) for column, name in enumerate(_ENTROPIES)),
    ):
        for index, row in enumerate(columns):
            if not _lie_within(row, bounds):
                wrong.add(f"{path}.rollouts[{index}].{name}", _what_is_unfit(row, bounds))


def _what_is_unfit(numbers: Floats, bounds: tuple[float, float]) -> str:
    if not np.isfinite(numbers).all():
        return "holds NaN or infinite numbers"
    worst = numbers.max() if numbers.max() > bounds[1] else numbers.min()
    return f"holds {worst:g}; required: {bounds[0]:g} to {bounds[1]:g}"
