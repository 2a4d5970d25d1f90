"""Whether what a state folder holds can be gone on from under the settings of now."""

from __future__ import annotations

from collections.abc import Iterable

from poise.learner.config import LearnerConfig
from poise.learner.models.model_set import holds_critic
from poise.learner.storage.checkpoint import StateMismatchError
from poise_client.types import Batch


def check_checkpoint(names: Iterable[str], config: LearnerConfig) -> None:
    """Raise `StateMismatchError` unless a checkpoint with these tensors holds a critic just where one is set."""
    _check("checkpoint", holds_critic(names), config)


def check_journalled(batch: Batch, config: LearnerConfig) -> None:
    """Raise `StateMismatchError` unless a journalled batch holds rewards exactly where a critic is configured."""
    _check(f"journalled batch {batch.batch_id}", any(rollout.reward is not None for rollout in batch.rollouts), config)


def _check(what: str, had_critic: bool, config: LearnerConfig) -> None:
    if had_critic == (config.critic is not None):
        return
    was, now, mend = ("with", "without", "set") if had_critic else ("without", "with", "remove")
    raise StateMismatchError(
        f"state_dir {config.state_dir} cannot be gone on from {now} a critic: its {what} is of a training {was} one; "
        f"{mend} `critic` in the learner's settings, or use a fresh state_dir to start again from the model"
    )
