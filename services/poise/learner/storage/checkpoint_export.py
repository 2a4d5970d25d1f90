"""A checkpoint as a Hugging Face folder, made beside the learner or without one.

Reads the state folder without holding it, so that the learner may go on: a checkpoint that it drops meanwhile is gone
for the newer one that is there then. Changes nothing in it.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from poise.learner.config import LearnerConfig
from poise.learner.distributed.process_group import World
from poise.learner.models.policy import Policy
from poise.learner.storage.checkpoint import DAMAGE, Checkpoint, StateError, checkpoint_folders, read_checkpoint

logger = logging.getLogger(__name__)

_PARAMETERS = "model."
_MAX_LOOKS = 5
"""How often the folder is looked at anew because what was there is gone."""


def newest_checkpoint(folder: Path) -> tuple[Path, Checkpoint]:
    """Return the newest undamaged checkpoint of a state folder, or the one that `folder` is; without its moments.

    Raises:
        StateError: there is none, or it is of another release.
    """
    if (folder / "state.json").is_file():
        try:
            return folder, read_checkpoint(folder, _PARAMETERS)
        except StateError:
            raise
        except DAMAGE as error:
            raise StateError(f"checkpoint {folder} is damaged: {error}; take another one") from error
    looked: list[Path] = []
    for _ in range(_MAX_LOOKS):
        looked = checkpoint_folders(folder)
        for path in reversed(looked):
            try:
                return path, read_checkpoint(path, _PARAMETERS)
            except StateError:
                raise
            except DAMAGE as error:
                if not path.exists():
                    break  # the learner has dropped it for newer ones
                logger.warning("checkpoint %s is damaged: %s; taking the one before", path, error)
        else:
            break
    if looked:
        raise StateError(f"none of the checkpoints in {folder} can be read; restore one from a backup")
    raise StateError(
        f"{folder} holds no checkpoint yet: the learner writes one every learner.checkpoint_every_steps steps, and "
        "when it is stopped"
    )


def export_checkpoint(config: LearnerConfig, path: Path, checkpoint: Checkpoint, target: Path) -> None:
    """Write a checkpoint's policy, adapters merged, with its tokenizer as the Hugging Face folder `target`; on the CPU.

    Raises:
        StateError: its parameters are not those that the settings make of the model.
        BackendDown: the model that training began with cannot be loaded.
    """
    policy = Policy(config.model_copy(update={"device": "cpu"}), World(torch.device("cpu")))
    trained = dict(policy.trained())
    found = {name.removeprefix(_PARAMETERS): tensor for name, tensor in checkpoint.tensors.items()}
    if {name: tensor.shape for name, tensor in found.items()} != {name: own.shape for name, own in trained.items()}:
        raise StateError(
            f"checkpoint {path} holds other parameters than model {config.model} has under these settings; name the "
            "run file of its run, with the same model and lora"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(found[name])
    policy.save(str(target))
