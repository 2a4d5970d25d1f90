"""Exact gradients of the policy on single rollouts, reduced to what noise and signal need.

The gradient of a group is Σ A_it·∇log π(y_it), linear in the advantages A_it. So two reductions of the token gradients
s_it serve every estimator: their inner products within a group, which are exact, and a sketch of each, whose inner
products between groups are unbiased.

The sketch multiplies each element by a random sign and sums every `SKETCH`-th one of each parameter. Its error in
‖Σ_g c_g‖² is about √(2 / SKETCH), 1 %.

Groups are written to files one by one, so an interrupted benchmark resumes.

Shapes: N rows of a group (tokens, or whole rollouts), P parameters, K sketch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray

from poise.learner.config import LearnerConfig
from poise.learner.distributed.process_group import World
from poise.learner.models.policy import Policy
from poise.learner.training.packing import PromptGroup, build_row
from poise.orchestrator.sampling.scored_groups import ScoredGroup

SKETCH = 16384
_CHUNK = SKETCH * 4
"""Elements at a time: they stay in the cache, and float32 sums of so few products are exact enough."""
_PROGRESS_S = 20.0

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Gradients:
    """The reduced gradients of one group. A row is a token, or a rollout with all its tokens."""

    products: Doubles
    """[N, N]: inner products of the rows."""
    sketch: NDArray[np.float32]
    """[N, K]."""


def gradients_of(
    folder: Path, name: str, groups: Sequence[ScoredGroup], config: LearnerConfig, temperature: float, *, by_token: bool
) -> list[Gradients]:
    """Return the gradients of each group, from files where they exist."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}-{index:05d}.npz" for index in range(len(groups))]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    if missing:
        policy = Policy(config, World(torch.device("cpu")))
        signs = _signs([each.numel() for _, each in policy.trained()])
        began = shown = time.monotonic()
        for done, index in enumerate(missing, 1):
            result = _gradients(policy, groups[index], signs, temperature, by_token)
            partial = paths[index].with_suffix(".partial.npz")
            np.savez(partial, products=result.products, sketch=result.sketch)
            partial.rename(paths[index])
            if time.monotonic() > shown + _PROGRESS_S or done == len(missing):
                shown = time.monotonic()
                left_s = (shown - began) / done * (len(missing) - done)
                click.echo(f"{name}: {done} of {len(missing)} groups, about {left_s:.0f} s left", err=True)
    results = []
    for path in paths:
        with np.load(path) as arrays:
            results.append(Gradients(arrays["products"], arrays["sketch"]))
    return results


def _signs(sizes: Sequence[int]) -> list[torch.Tensor]:
    """Return a random sign for each element of each parameter, int8."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8) * 2 - 1 for size in sizes]


def _gradients(
    policy: Policy, item: ScoredGroup, signs: Sequence[torch.Tensor], temperature: float, by_token: bool
) -> Gradients:
    parameters = [parameter for _, parameter in policy.trained()]
    group = PromptGroup(item.group.prompt_token_ids, item.group.rollouts)
    row = build_row([group], torch.device("cpu"), torch.float32)
    logprobs_N, _ = policy.logprobs(row, temperature)
    lengths = [1] * logprobs_N.numel() if by_token else [r.token_ids.size for r in item.group.rollouts]
    rows, start = [], 0
    for index, length in enumerate(lengths):
        total = logprobs_N[start : start + length].sum()
        rows.append(torch.autograd.grad(total, parameters, retain_graph=index + 1 < len(lengths)))
        start += length
    products = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    sketch = torch.zeros(len(rows), SKETCH)
    for gradients, own_signs in zip(zip(*rows, strict=True), signs, strict=True):
        for first in range(0, own_signs.numel(), _CHUNK):
            chunk = slice(first, first + _CHUNK)
            part = torch.stack([gradient.flatten()[chunk] for gradient in gradients])
            products += (part @ part.T).double()
            folded = torch.nn.functional.pad(part * own_signs[chunk], (0, -part.shape[1] % SKETCH))
            sketch += folded.view(len(rows), -1, SKETCH).sum(1)
    return Gradients(products.numpy(), sketch.numpy())
