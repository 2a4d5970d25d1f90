"""The policy and its optimiser: one batch in, the numbers of the step out.

Owns the model in memory. Knows no versions, no files but the model's, no transport.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError

from poise.errors import BackendDown
from poise.learner.config import LearnerConfig
from poise.learner.losses import policy_losses
from poise.learner.rows import GroupRow, MicroBatch, build_micro_batch, group_rows, micro_batches
from poise_client.types import StepMetrics, TrainingRollout, WeightArray

logger = logging.getLogger(__name__)

_ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class _Totals:
    """Sums over the tokens of a step."""

    loss: float = 0.0
    entropy: float = 0.0
    mismatch_logprob: float = 0.0
    mismatch_kl: float = 0.0
    clipped: float = 0.0
    truncated: float = 0.0
    num_tokens: int = 0
    gradient_norm: float = 0.0
    num_updates: int = 0


class Trainer:
    """Full fine-tuning in one process. Its calls must not overlap."""

    def __init__(self, config: LearnerConfig) -> None:
        self._config = config
        self._model: Any = None
        self._optimiser: torch.optim.AdamW | None = None
        self._num_updates = 0
        """Optimiser steps ever taken: the learning rate follows it."""

    def load(self) -> None:
        """Load the model to start from. Raises `BackendDown` when it cannot be, or cannot be trained."""
        config = self._config
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                config.model, dtype=torch.float32, attn_implementation="sdpa"
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise BackendDown(f"model {config.model} cannot be loaded: {error}") from error
        _refuse_unless_all_attend_to_all(model.config, config.model)
        self._model = model.to(config.device).train()
        settings = config.optimiser
        self._optimiser = torch.optim.AdamW(
            self._model.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    @property
    def max_tokens(self) -> int:
        """Most tokens of prompt and response together."""
        limit: int = self._model.config.max_position_embeddings
        return limit

    @property
    def vocabulary_size(self) -> int:
        """Ids are below it."""
        size: int = self._model.config.vocab_size
        return size

    def train(self, rollouts: Sequence[TrainingRollout], temperature: float) -> StepMetrics:
        """Take one optimiser step for each mini-batch of prompts, one epoch. Needs at least one rollout."""
        started = time.monotonic()
        rows = group_rows(rollouts)
        size = self._config.mini_batch_prompts
        mini_batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        # With one mini-batch the policy before the step is the policy of its only forward pass.
        old = self._logprobs(mini_batches[1:], temperature) if len(mini_batches) > 1 else iter(())
        old_by_mini_batch = [None, *old]
        totals = _Totals()
        for mini_batch, old_logprobs in zip(mini_batches, old_by_mini_batch, strict=True):
            self._update(mini_batch, old_logprobs, temperature, totals)
        tokens = totals.num_tokens
        return StepMetrics(
            loss=totals.loss / tokens,
            entropy=totals.entropy / tokens,
            mismatch_logprob=totals.mismatch_logprob / tokens,
            mismatch_kl=totals.mismatch_kl / tokens,
            clip_share=totals.clipped / tokens,
            truncated_share=totals.truncated / tokens,
            gradient_norm=totals.gradient_norm / len(mini_batches),
            learning_rate=self._learning_rate(max(0, self._num_updates - 1)),
            num_tokens=tokens,
            num_rollouts=len(rollouts),
            num_updates=totals.num_updates,
            train_s=time.monotonic() - started,
        )

    def weights(self) -> dict[str, WeightArray]:
        """Return a copy of every parameter by its Hugging Face name, tied ones once."""
        dtype = getattr(torch, self._config.dtype)
        return {
            name: _to_array(parameter.detach().to("cpu", dtype, copy=True))
            for name, parameter in self._model.named_parameters()
        }

    def save_model(self, folder: str) -> None:
        """Write the policy and its tokenizer as a Hugging Face folder."""
        self._model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(self._config.model).save_pretrained(folder)

    def state(self) -> tuple[dict[str, torch.Tensor], int]:
        """Return all that training goes on from: tensors by name, and the count of updates. Not copies."""
        tensors = {f"model.{name}": parameter.detach() for name, parameter in self._model.named_parameters()}
        for name, parameter in self._model.named_parameters():
            # A parameter that never had a gradient has no state.
            tensors |= {f"{kind}.{name}": value for kind, value in self._adam().state.get(parameter, {}).items()}
        return tensors, self._num_updates

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, torch.Tensor], num_updates: int) -> None:
        """Take over what `state` gave.

        Raises:
            KeyError: a parameter is missing. The trainer is then half restored: load it again.
        """
        optimiser = self._adam()
        for name, parameter in self._model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            optimiser.state.pop(parameter, None)
            if f"{_ADAM_STATE[0]}.{name}" in tensors:
                optimiser.state[parameter] = {
                    kind: tensors[f"{kind}.{name}"].to(parameter.device, copy=True) for kind in _ADAM_STATE
                }
        self._num_updates = num_updates

    def _adam(self) -> torch.optim.AdamW:
        assert self._optimiser is not None  # noqa: S101 (loaded)
        return self._optimiser

    def _learning_rate(self, update: int) -> float:
        settings = self._config.optimiser
        if update < settings.warmup_updates:
            return settings.learning_rate * (update + 1) / settings.warmup_updates
        return settings.learning_rate

    def _update(
        self, rows: Sequence[GroupRow], old: list[torch.Tensor] | None, temperature: float, totals: _Totals
    ) -> None:
        """One optimiser step on the mean loss over the mini-batch's tokens."""
        optimiser = self._adam()
        num_tokens = sum(rollout.token_ids.size for row in rows for rollout in row.rollouts)
        optimiser.zero_grad(set_to_none=True)
        for index, batch in enumerate(self._batches(rows)):
            logits = self._logits(batch, temperature)
            logprobs_NV = torch.log_softmax(logits, -1)
            logprobs = logprobs_NV.gather(-1, batch.targets_N[:, None])[:, 0]
            before = logprobs.detach() if old is None else old[index]
            tokens = policy_losses(logprobs, before, batch.rollout_logprobs_N, batch.advantages_N, self._config.loss)
            loss = tokens.losses_N.sum() / num_tokens
            loss.backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                difference = before - batch.rollout_logprobs_N
                totals.loss += float(tokens.losses_N.sum())
                totals.entropy += float(torch.special.entr(logprobs_NV.exp()).sum())
                totals.mismatch_logprob += float(difference.abs().sum())
                totals.mismatch_kl += float((difference.exp() - 1 - difference).sum())
                totals.clipped += float(tokens.clipped_N.sum())
                totals.truncated += float(tokens.truncated_N.sum())
        totals.num_tokens += num_tokens
        norm = float(torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._config.optimiser.gradient_clip))
        totals.gradient_norm += norm
        if not np.isfinite(norm):
            logger.error("a gradient is not finite: this mini-batch changes nothing; look at its advantages")
            return
        for group in optimiser.param_groups:
            group["lr"] = self._learning_rate(self._num_updates)
        optimiser.step()
        self._num_updates += 1
        totals.num_updates += 1

    @torch.no_grad()
    def _logprobs(self, mini_batches: Sequence[Sequence[GroupRow]], temperature: float) -> Iterator[list[torch.Tensor]]:
        """Return, for each mini-batch, the log-probabilities of its micro-batches' targets by the policy of now."""
        answers = []
        for rows in mini_batches:
            answer = []
            for batch in self._batches(rows):
                logprobs_NV = torch.log_softmax(self._logits(batch, temperature), -1)
                answer.append(logprobs_NV.gather(-1, batch.targets_N[:, None])[:, 0])
            answers.append(answer)
        return iter(answers)

    def _batches(self, rows: Sequence[GroupRow]) -> Iterator[MicroBatch]:
        for part in micro_batches(rows, self._config.micro_batch_tokens):
            yield build_micro_batch(part, self._config.device)

    def _logits(self, batch: MicroBatch, temperature: float) -> torch.Tensor:
        """Return float32 logits, after temperature, where response tokens are predicted, [N, V]."""
        dtype = getattr(torch, self._config.dtype)
        with torch.autocast(torch.device(self._config.device).type, dtype, enabled=dtype != torch.float32):
            states_BLd = self._model.get_decoder()(
                input_ids=batch.token_ids_BL,
                attention_mask=batch.mask_B1LL,
                position_ids=batch.positions_BL,
                use_cache=False,
            ).last_hidden_state
            states_Nd = states_BLd.flatten(0, 1)[batch.predictors_N]
            logits: torch.Tensor = self._model.get_output_embeddings()(states_Nd)
        return logits.float() / temperature


def _refuse_unless_all_attend_to_all(config: Any, model: str) -> None:
    """Rows of siblings replace the model's own mask: one that looks back over a window, or recurs, would be wrong."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds and getattr(config, "sliding_window", None) is not None:
        kinds = {"sliding_attention"}
    if others := sorted(kinds - {"full_attention"}):
        raise BackendDown(
            f"model {model} has layers of {', '.join(others)}; the learner trains models of full attention alone"
        )


def _to_array(tensor: torch.Tensor) -> WeightArray:
    if tensor.dtype == torch.bfloat16:
        bits: NDArray[np.generic] = tensor.view(torch.uint16).numpy()
        return WeightArray(bits, "bfloat16")
    return WeightArray(tensor.numpy(), "float32")
