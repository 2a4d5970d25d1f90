"""What a policy was made of: the model that training started from, and its adapters.

A checkpoint belongs to one origin. Under another its tensors would fit nothing or, worse, fit and mean something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from poise.learner.config import LearnerConfig
from poise.learner.publishing.published import HashedWeights

Shapes = Mapping[str, tuple[int, ...]]


def origin_of(config: LearnerConfig, weights: HashedWeights) -> dict[str, Any]:
    """Return what a checkpoint is to remember; `weights` are those before any training, in `config.dtype`."""
    lora = None if config.lora is None else config.lora.model_dump(mode="json")
    about: dict[str, Any] = {"model": config.model, "lora": lora}
    if weights.adapter is not None:  # these say nothing of the model
        return about | {"digest_of": "files", "digest": weights.adapter.base_digest.hex()}
    return about | {"digest_of": config.dtype, "digest": weights.digest.hex()}


def misfit(then: Mapping[str, Any], now: Mapping[str, Any], shapes_then: Shapes, shapes_now: Shapes) -> str:
    """Return why a checkpoint of one origin cannot be gone on from under another, naming the setting; empty if it can.

    Args:
        then: the checkpoint's origin; empty if it remembers none.
        now: the one that is configured.
        shapes_then: of the checkpoint's trained parameters, by name.
        shapes_now: of those there are.
    """
    if then and then["lora"] != now["lora"]:
        return f"it was made with lora: {then['lora']}, and lora is {now['lora']} now"
    # In another dtype the same weights are rounded to others, and files hold any: nothing can be told then.
    if then and then["digest_of"] == now["digest_of"] and then["digest"] != now["digest"]:
        return f"it was made from model {then['model']}, and model {now['model']} has other weights"
    if shapes_then.keys() != shapes_now.keys():
        name = min(shapes_then.keys() ^ shapes_now.keys())
        return (
            f"{name} is {'not there' if name in shapes_then else 'new'}: model or lora is another than it was made with"
        )
    for name, shape in shapes_then.items():
        if shape != shapes_now[name]:
            return (
                f"{name} is {list(shape)} in it and {list(shapes_now[name])} now: model or lora is another than it was "
                "made with"
            )
    return ""
