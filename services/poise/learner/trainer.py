"""The policy and its optimiser: one batch in, the numbers of the step out.

Owns the model in memory. Knows no versions, no files but the model's, no transport.

Shapes: N response tokens of a packed row.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError

from poise.errors import BackendDown
from poise.learner import attention
from poise.learner.accumulation import Before, Sums, accumulate
from poise.learner.config import LearnerConfig
from poise.learner.flops import ModelSize, model_size, peak_flops
from poise.learner.logprobs import token_logprobs
from poise.learner.losses import denominator
from poise.learner.packing import PackedRow, PromptGroup, build_row, group_by_prompt, pack
from poise_client.types import StepMetrics, TrainingRollout, WeightArray

logger = logging.getLogger(__name__)

_ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


class Trainer:
    """Full fine-tuning in one process. Its calls must not overlap."""

    def __init__(self, config: LearnerConfig) -> None:
        self._config = config
        self._device = torch.device(config.device)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._model: Any = None
        self._reference: Any = None
        """The model that training started from; None where the loss does not look at it."""
        self._optimiser: torch.optim.AdamW | None = None
        self._num_updates = 0
        """Optimiser steps ever taken: the learning rate follows it."""
        self.num_skipped_in_a_row = 0
        """Mini-batches since the last one that changed the policy."""
        self._size: ModelSize | None = None
        self._peak_flops = config.peak_flops or peak_flops(self._device, self._dtype)

    def load(self) -> None:
        """Load the model to start from. Raises `BackendDown` when it cannot be, or cannot be trained."""
        config = self._config
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self._model = self._load_model().train()
        self._size = model_size(self._model)
        if config.gradient_checkpointing:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.loss.kl_coefficient:
            self._reference = self._load_model().eval().requires_grad_(False)
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
        """Take one optimiser step for each mini-batch of prompts, one epoch. Needs at least one rollout.

        A mini-batch whose loss or gradient is not finite changes nothing, and has no part in the means.
        """
        started = time.monotonic()
        groups = group_by_prompt(rollouts)
        size = self._config.mini_batch_prompts
        mini_batches = [self._rows(groups[start : start + size]) for start in range(0, len(groups), size)]
        # The policy before the step is that of the first mini-batch's only forward pass.
        recompute = self._config.loss.old_logprobs == "recompute"
        before = [self._before(rows, temperature, policy=recompute and i > 0) for i, rows in enumerate(mini_batches)]
        totals, units, norms = Sums(), 0, []
        num_updates = self._num_updates
        for index, rows in enumerate(mini_batches):
            sums, norm = self._update(rows, before[index], temperature, first=index == 0)
            norms.append(norm)
            if self.num_skipped_in_a_row == 0:
                totals += sums
                units += self._denominator(rows)
        num_updates = self._num_updates - num_updates
        train_s = time.monotonic() - started
        num_model_tokens = sum(row.num_tokens for rows in mini_batches for row in rows)
        clips = (totals.clip_low, totals.clip_high, totals.dual_clip)
        return StepMetrics(
            loss=_mean(totals.loss, units),
            entropy=_mean(totals.entropy, totals.num_tokens),
            mismatch_logprob=_mean(totals.mismatch_logprob, totals.num_compared),
            mismatch_kl=_mean(totals.mismatch_kl, totals.num_compared),
            clip_share=_mean(sum(clips), totals.num_tokens),
            clip_low_share=_mean(totals.clip_low, totals.num_tokens),
            clip_high_share=_mean(totals.clip_high, totals.num_tokens),
            dual_clip_share=_mean(totals.dual_clip, totals.num_tokens),
            truncated_share=_mean(totals.truncated, totals.num_tokens),
            reference_kl=_mean(totals.reference_kl, totals.num_tokens),
            gradient_norm=_mean(sum(norms), len(norms)),
            learning_rate=self._learning_rate(max(0, self._num_updates - 1)),
            num_tokens=int(totals.num_tokens),
            num_rollouts=len(rollouts),
            num_updates=num_updates,
            num_skipped_updates=len(mini_batches) - num_updates,
            num_model_tokens=num_model_tokens,
            train_s=train_s,
            tokens_per_s=num_model_tokens / train_s,
            mfu=self._mfu(mini_batches, train_s),
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
        self, rows: Sequence[PackedRow], before: Sequence[Before], temperature: float, *, first: bool
    ) -> tuple[Sums, float]:
        """Take one optimiser step on the loss of a mini-batch; return its sums, and the gradient's norm."""
        optimiser = self._adam()
        optimiser.zero_grad(set_to_none=True)
        sums = Sums()
        for row, known in zip(rows, before, strict=True):
            sums += accumulate(
                lambda row: self._logprobs(self._model, row, temperature),
                row,
                known,
                first=first,
                denominator=self._denominator(rows),
                config=self._config.loss,
            )
        norm = float(torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._config.optimiser.gradient_clip))
        if not (math.isfinite(norm) and math.isfinite(sums.loss)):
            logger.error(
                "a mini-batch changes nothing: its loss is %s, the norm of its gradient %s; look at its advantages",
                sums.loss,
                norm,
            )
            optimiser.zero_grad(set_to_none=True)
            self.num_skipped_in_a_row += 1
            return sums, norm
        for group in optimiser.param_groups:
            group["lr"] = self._learning_rate(self._num_updates)
        optimiser.step()
        self._num_updates += 1
        self.num_skipped_in_a_row = 0
        return sums, norm

    @torch.no_grad()
    def _before(self, rows: Sequence[PackedRow], temperature: float, *, policy: bool) -> list[Before]:
        """Ask the policy, if so told, and the reference, if there is one, of the tokens of a mini-batch."""
        return [
            Before(
                self._logprobs(self._model, row, temperature)[0] if policy else None,
                self._logprobs(self._reference, row, temperature)[0] if self._reference is not None else None,
            )
            for row in rows
        ]

    def _rows(self, groups: Sequence[PromptGroup]) -> list[PackedRow]:
        packed = pack(groups, self._config.micro_batch_tokens)
        return [build_row(row, self._device, self._dtype) for row in packed]

    def _denominator(self, rows: Sequence[PackedRow]) -> int:
        num_tokens = sum(row.targets_N.numel() for row in rows)
        num_rollouts = sum(row.lengths_R.numel() for row in rows)
        return denominator(num_tokens, num_rollouts, self._config.loss)

    def _logprobs(self, model: Any, row: PackedRow, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities and entropies of a row's targets, [N] each."""
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            states_1Ld = model.get_decoder()(
                input_ids=row.token_ids_1L,
                position_ids=row.positions_1L,
                attention_spans=row.spans,
                use_cache=False,
            ).last_hidden_state
        return token_logprobs(
            states_1Ld[0].index_select(0, row.predictors_N),
            model.get_output_embeddings(),
            row.targets_N,
            temperature,
            self._config.logprob_chunk_tokens,
            self._dtype,
        )

    def _mfu(self, mini_batches: Sequence[Sequence[PackedRow]], train_s: float) -> float:
        if self._peak_flops is None or self._size is None:
            return 0.0
        flops = sum(
            self._size.training_flops(row.num_tokens, row.targets_N.numel(), row.num_attended)
            for rows in mini_batches
            for row in rows
        )
        return flops / train_s / self._peak_flops

    def _load_model(self) -> Any:
        config = self._config
        attention.register()
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                config.model, dtype=torch.float32, attn_implementation=attention.PACKED
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise BackendDown(f"model {config.model} cannot be loaded: {error}") from error
        _refuse_unless_all_attend_to_all(model.config, config.model)
        return model.to(self._device)


def _mean(total: float, count: float) -> float:
    """Over nothing, not a number."""
    return total / count if count else math.nan


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
