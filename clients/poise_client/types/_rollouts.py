"""Prompts, rollouts and groups.

Shapes: P prompt tokens, T response tokens, d the model's width, n rollouts of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float32]
Halves = NDArray[np.float16]
Ints = NDArray[np.int32]

FinishReason = Literal["stop", "length", "abort"]

DEFAULT_DOMAIN = "default"
"""Domain of groups without one."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    """"system", "user" or "assistant"."""
    content: str


PromptContent = str | Sequence[Message] | Sequence[int]
"""Text, a conversation for the model's chat template, or token ids."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt. Its rollouts form a group."""

    group_id: str
    """Unique within the request."""
    content: PromptContent


@dataclass(frozen=True, slots=True)
class Sampling:
    """Options of sampling."""

    temperature: float = 1.0
    """Log-probabilities, entropies and the loss use the distribution after it. 0 is greedy: do not train on it."""
    top_p: float = 1.0
    """Nucleus mass, above 0 and at most 1."""
    top_k: int = 0
    """Keep only the k most likely tokens; 0 keeps all."""
    max_tokens: int = 0
    """Maximum number of response tokens; 0 is the service's default."""
    stop: tuple[str, ...] = ()
    """Strings that end a response; they remain in it. They may contain special tokens, such as `<|im_end|>`."""
    seed: int | None = None
    """Makes sampling repeatable. None samples differently each time."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response, in addition to the model's own; they remain in it."""


@dataclass(frozen=True, slots=True)
class RolloutId:
    """The permanent id of a rollout."""

    run_id: str
    step: int
    group_id: str
    rollout_index: int


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """The policy version that sampled the response tokens [start_token, end_token)."""

    start_token: int
    end_token: int
    policy_version: int


@dataclass(frozen=True, slots=True)
class EntropyStats:
    """Summary of token entropies over one part of a response, in nats; zeros if the part is empty."""

    mean: float = 0.0
    last: float = 0.0
    max: float = 0.0
    min: float = 0.0


_NO_FLOATS, _NO_HALVES, _NO_INTS = np.zeros(0, np.float32), np.zeros(0, np.float16), np.zeros(0, np.int32)
for _array in (_NO_FLOATS, _NO_HALVES, _NO_INTS):  # shared defaults
    _array.flags.writeable = False


def _no_floats() -> Floats:
    return _NO_FLOATS


def _no_halves() -> Halves:
    return _NO_HALVES


def _no_ints() -> Ints:
    return _NO_INTS


@dataclass(frozen=True, slots=True)
class Features:
    """The probe's input for one rollout."""

    prompt_hidden: Floats = field(default_factory=_no_floats)
    """[d]; empty if the value service needs no hidden states."""
    response_hidden: Floats = field(default_factory=_no_floats)
    """[d]; empty if the value service needs no hidden states."""
    output_entropy: EntropyStats = EntropyStats()
    reasoning_entropy: EntropyStats = EntropyStats()
    answer_entropy: EntropyStats = EntropyStats()


_NO_FEATURES = Features()


def _no_features() -> Features:
    return _NO_FEATURES


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response, from sampling to training.

    Each call sends only the fields it needs. So a rollout read from a batch has no features, and one read from a label
    has no tokens.
    """

    id: RolloutId
    prompt_token_ids: Ints = field(default_factory=_no_ints)
    """[P]"""
    token_ids: Ints = field(default_factory=_no_ints)
    """[T]: the response, with the stop token if one was sampled."""
    logprobs: Floats = field(default_factory=_no_floats)
    """[T], in nats: under the distribution over the full vocabulary after temperature."""
    version_spans: tuple[VersionSpan, ...] = ()
    """The policy version that sampled each token."""
    features: Features = field(default_factory=_no_features)
    """The probe's input."""
    reward: float | None = None
    """Set it after scoring. The value service requires [0, 1]."""
    advantage: float | None = None
    """reward − baseline. The learner needs either `advantage` or `advantages`, or neither if it has a critic."""
    advantages: Floats | None = None
    """[T]: one advantage per token."""
    finish_reason: FinishReason = "stop"
    """Always "stop" in rollouts read from batches and labels, which do not store it."""
    text: str = ""
    """The decoded response without special tokens."""
    token_entropies: Halves = field(default_factory=_no_halves)
    """[T], in nats: entropies of the distribution over the full vocabulary after temperature. float16 rounds them by at
    most 0.05 %."""
    sum_squared_probs: Halves = field(default_factory=_no_halves)
    """[T]: Σ p² over the vocabulary, for the distribution of each token. float16 rounds it by at most 0.00024. Clip the
    score norm 1 − 2p + Σ p² of a token to its range, (1 − p)² to 2(1 − p)²."""
    first_token_s: float = 0.0
    """Time from entering the engine to the first token, in seconds."""
    total_s: float = 0.0
    """Time from entering the engine to the last token, in seconds."""


@dataclass(frozen=True, slots=True)
class Group:
    """All rollouts of one prompt in one step."""

    group_id: str
    rollouts: tuple[Rollout, ...]
    domain: str = DEFAULT_DOMAIN
    """Selects the estimator of baselines."""
    num_rollouts: int = -1
    """Number of rollouts that were sampled; by default those in `rollouts`. Incomplete groups cannot be learnt from."""
    prompt_id: str = ""
    """Names the prompt across steps. If it is empty, the value service gets a hash of the prompt's tokens."""

    def __post_init__(self) -> None:
        if self.num_rollouts < 0:
            object.__setattr__(self, "num_rollouts", len(self.rollouts))

    @property
    def prompt_token_ids(self) -> Ints:
        """The prompt as the model saw it, [P]."""
        return self.rollouts[0].prompt_token_ids if self.rollouts else _no_ints()

    @property
    def run_id(self) -> str:
        """The training run of the rollouts."""
        return self.rollouts[0].id.run_id if self.rollouts else ""

    @property
    def step(self) -> int:
        """The step of the rollouts."""
        return self.rollouts[0].id.step if self.rollouts else 0

    @property
    def rewards(self) -> Floats | None:
        """The rewards, [n]; None if a rollout has none."""
        rewards = [rollout.reward for rollout in self.rollouts]
        return None if None in rewards else np.array(rewards, np.float32)

    def scored(self, rewards: ArrayLike, domain: str | None = None) -> Group:
        """Return this group with a reward for each rollout, [n], and optionally with another domain.

        The reward of a single rollout may be a number.

        Raises:
            ValueError: the number of rewards differs from the number of rollouts.
        """
        values = np.atleast_1d(np.asarray(rewards, np.float32))
        if values.shape != (len(self.rollouts),):
            raise ValueError(
                f"group {self.group_id!r} has {len(self.rollouts)} rollouts but rewards of shape {values.shape}. "
                "Pass one reward for each rollout."
            )
        rollouts = tuple(
            dataclasses.replace(rollout, reward=reward)
            for rollout, reward in zip(self.rollouts, values.tolist(), strict=True)
        )
        return dataclasses.replace(self, rollouts=rollouts, domain=self.domain if domain is None else domain)


@dataclass(frozen=True, slots=True)
class PromptCheck:
    """Whether a prompt can be sampled."""

    group_id: str
    num_tokens: int
    """Number of prompt tokens; 0 if the prompt cannot be sampled."""
    problem: str
    """Why the prompt cannot be sampled; empty if it can. The check ignores its length."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Hidden state of a prompt, from one pass through the model without sampling."""

    group_id: str
    num_prompt_tokens: int
    prompt_hidden: Floats
    """[d]: the same value as in the features of the prompt's rollouts."""
    policy_version: int
    """The policy version that computed the hidden state."""
