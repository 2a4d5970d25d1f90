"""Checks before the learner resumes: a state folder is valid only for the model, adapters and critic it was made with.

With others, its tensors would have the wrong shapes or, worse, the right shapes with another meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from poise.learner.config import LearnerConfig
from poise.learner.publishing.weight_version import WeightVersion
from poise.learner.storage.checkpoint import Checkpoint, StateMismatchError
from poise.learner.training.trainer import has_critic_tensors
from poise_client.types import Batch

Shapes = Mapping[str, tuple[int, ...]]


def origin_of(config: LearnerConfig, initial: WeightVersion) -> dict[str, Any]:
    """Return what a checkpoint records about its model and adapters; `initial` are the weights before any training."""
    lora = None if config.lora is None else config.lora.model_dump(mode="json")
    origin: dict[str, Any] = {"model": config.model, "lora": lora}
    if initial.adapter is not None:  # the weights are the adapter's and say nothing about the model
        return origin | {"digest_of": "files", "digest": initial.adapter.base_digest.hex()}
    return origin | {"digest_of": config.dtype, "digest": initial.digest.hex()}


def check_checkpoint(checkpoint: Checkpoint, config: LearnerConfig, origin: Mapping[str, Any], shapes: Shapes) -> None:
    """Check that a checkpoint was made with these settings.

    Args:
        checkpoint: the checkpoint.
        config: the settings.
        origin: the result of `origin_of` for these settings.
        shapes: shapes of the parameters that are trained under them, by name.

    Raises:
        StateMismatchError: it was made with another model or other adapters, or a critic was added or removed.
    """
    _check_critic("checkpoint", has_critic_tensors(checkpoint.tensors), config)
    found = {name: tuple(t.shape) for name, t in checkpoint.tensors.items() if name.startswith("model.")}
    if error := resume_error(checkpoint.progress.origin, origin, found, shapes):
        raise StateMismatchError(
            f"cannot resume from the checkpoint in state_dir {config.state_dir}: {error}. Restore the old value, or "
            "use a fresh state_dir to start from the model"
        )


def check_batch(batch: Batch, config: LearnerConfig) -> None:
    """Raise `StateMismatchError` unless a journalled batch has rewards exactly when a critic is configured."""
    has_rewards = any(rollout.reward is not None for rollout in batch.rollouts)
    _check_critic(f"journalled batch {batch.batch_id}", has_rewards, config)


def resume_error(old: Mapping[str, Any], new: Mapping[str, Any], old_shapes: Shapes, new_shapes: Shapes) -> str:
    """Return why a checkpoint cannot be resumed under other settings, naming the setting; "" if it can.

    Args:
        old: the checkpoint's origin; empty if it records none.
        new: the origin under the current settings.
        old_shapes: shapes of the checkpoint's trained parameters, by name.
        new_shapes: shapes of the trained parameters under the current settings.
    """
    if old and old["lora"] != new["lora"]:
        return f"it was made with lora {old['lora']}, but lora is {new['lora']} now"
    # Digests of different kinds, or of weights rounded to another dtype, cannot be compared.
    if old and old["digest_of"] == new["digest_of"] and old["digest"] != new["digest"]:
        return f"it was made from model {old['model']}, but model {new['model']} has other weights"
    for name in sorted(old_shapes.keys() | new_shapes.keys()):
        found, expected = old_shapes.get(name), new_shapes.get(name)
        if found != expected:
            return f"parameter {name} is {_shape(found)} in it but {_shape(expected)} now, so model or lora has changed"
    return ""


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _check_critic(what: str, had_critic: bool, config: LearnerConfig) -> None:
    if had_critic == (config.critic is not None):
        return
    was, now, remedy = ("with", "without", "Set") if had_critic else ("without", "with", "Remove")
    raise StateMismatchError(
        f"cannot resume from state_dir {config.state_dir} {now} a critic: its {what} was written {was} one. "
        f"{remedy} `critic` in the learner's settings, or use a fresh state_dir to start from the model"
    )
