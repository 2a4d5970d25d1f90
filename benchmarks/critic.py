"""A critic for probe_ablation: the same model with a value head instead of the vocabulary, all weights trained.

The value of a prompt is the logistic function of a linear map of the last layer's normed state at the prompt's last
token, where PPO's critic is before the first action. It is fitted by cross-entropy to the rewards of the prompt's
rollouts. A rollout's own response is not an input, because that would bias its baseline.

Shapes: P prompts, d the model's width.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

BATCH_PROMPTS = 16
MODEL_LEARNING_RATE = 2e-5
HEAD_LEARNING_RATE = 1e-3
WARMUP_SHARE = 0.1
"""Share of the updates; after them the rates fall linearly to 0."""
SETTINGS = {
    "batch_prompts": BATCH_PROMPTS,
    "model_learning_rate": MODEL_LEARNING_RATE,
    "head_learning_rate": HEAD_LEARNING_RATE,
    "warmup_share": WARMUP_SHARE,
}
"""Settings that a critic depends on, besides its data and the number of epochs."""


class Critic(torch.nn.Module):
    """A critic that starts as a constant, the mean reward."""

    def __init__(self, model: str, mean_reward: float) -> None:
        super().__init__()
        self.backbone = transformers.AutoModel.from_pretrained(model, dtype=torch.float32)
        self.head = torch.nn.Linear(self.backbone.config.hidden_size, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.constant_(self.head.bias, float(np.log(mean_reward / (1 - mean_reward))))

    def forward(self, prompts: Sequence[Ints]) -> torch.Tensor:
        """Return the logit of each prompt's value, [P]."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        # Padded on the right, where causal attention never looks.
        padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(p).long() for p in prompts], batch_first=True)
        states = self.backbone(input_ids=padded, use_cache=False).last_hidden_state
        logits: torch.Tensor = self.head(states[torch.arange(len(prompts)), lengths - 1])[:, 0]
        return logits

    @torch.no_grad()
    def values(self, prompts: Sequence[Ints]) -> Floats:
        """Return the value of each prompt, [P], in [0, 1]."""
        values = np.zeros(len(prompts), np.float32)
        for indices in _alike(prompts, range(len(prompts))):
            values[indices] = torch.sigmoid(self([prompts[index] for index in indices])).numpy()
        return values


@dataclass(frozen=True, eq=False)
class Trained:
    """Values of a critic after each epoch."""

    values: list[Floats]
    """[held-out prompts] for each epoch."""
    seconds: list[float]
    """Training time until the end of each epoch: updates so far × the median update, whatever the load."""


def train(
    model: str, prompts: Sequence[Ints], mean_rewards: Floats, held_out: Sequence[Ints], num_epochs: int
) -> Trained:
    """Fine-tune all weights on prompts [P] and the mean rewards of their rollouts [P], in random batches.

    Cross-entropy is linear in its target, so the mean reward gives the mean gradient of the single rewards.
    """
    torch.manual_seed(0)
    source = random.Random(0)
    critic = Critic(model, float(mean_rewards.mean()))
    optimizer = torch.optim.AdamW(
        [
            {"params": critic.backbone.parameters(), "lr": MODEL_LEARNING_RATE},
            {"params": critic.head.parameters(), "lr": HEAD_LEARNING_RATE},
        ]
    )
    num_updates = num_epochs * -(-len(prompts) // BATCH_PROMPTS)
    warmup = max(1, round(WARMUP_SHARE * num_updates))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: min((update + 1) / warmup, (num_updates - update) / (num_updates - warmup))
    )
    trained = Trained([], [])
    update_s: list[float] = []
    for epoch in range(num_epochs):
        batches = _shuffled(prompts, source)
        for indices in tqdm(batches, desc=f"critic, epoch {epoch + 1} of {num_epochs}", unit="update"):
            started_s = time.perf_counter()
            targets = torch.from_numpy(mean_rewards[indices])
            loss = binary_cross_entropy_with_logits(critic([prompts[index] for index in indices]), targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            update_s.append(time.perf_counter() - started_s)
        trained.seconds.append(len(update_s) * statistics.median(update_s))
        trained.values.append(critic.values(held_out))
    return trained


def _shuffled(prompts: Sequence[Ints], source: random.Random) -> list[list[int]]:
    """Return batches of prompts of similar length, to save padding, in random order."""
    order = list(range(len(prompts)))
    source.shuffle(order)
    pools = [order[start : start + 4 * BATCH_PROMPTS] for start in range(0, len(order), 4 * BATCH_PROMPTS)]
    batches = [batch for pool in pools for batch in _alike(prompts, pool)]
    source.shuffle(batches)
    return batches


def _alike(prompts: Sequence[Ints], indices: Sequence[int]) -> Iterator[list[int]]:
    by_length = sorted(indices, key=lambda index: len(prompts[index]))
    for start in range(0, len(by_length), BATCH_PROMPTS):
        yield by_length[start : start + BATCH_PROMPTS]
