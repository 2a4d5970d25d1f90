"""Records hidden states, log-probabilities and entropies of running rollouts in vLLM's worker.

Memory is allocated once, in slots. The slot of a rollout holds the sum of its prompt's last states, a ring buffer of
its latest response states, the pooled state at its last `</think>`, and three floats per token. Slots are on the
model's device. Each step writes them with a few indexed operations and no synchronization. Only `collect` copies to
the host.

Positions count from the start of the prompt. This module does not import vLLM.

Shapes: N tokens of a step, R requests of a step, V vocabulary, d the model's width, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from poise.generation.engines.vllm.think_tokens import ENDED, NUM_STATES
from poise.generation.engines.vllm.token_statistics import TokenStatistics

RUN_ON_TOKENS = 22
"""Response states kept beyond the pooled window, because vLLM samples more tokens before it detects a stop string."""

IntArray = NDArray[np.int64]

Record = tuple[bytes, bytes, bytes, bytes, bytes]
"""float32 bytes of prompt_hidden [d], response_hidden [d], logprobs [T], entropies [T] and sum_squared_probs [T].

response_hidden is empty if its states were overwritten."""

NEVER = -1


@dataclass(frozen=True, slots=True)
class _Step:
    """The requests of the current step."""

    slots_R: IntArray
    sampled_R: IntArray
    """Index of the response token that each request samples."""


class Recorder:
    """Records up to `num_slots` rollouts at once. Further ones are not recorded."""

    def __init__(
        self,
        *,
        num_slots: int,
        response_pool_tokens: int,
        hidden_size: int,
        max_model_len: int,
        think_table_SV: torch.Tensor,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        rows = num_slots + 1  # requests without a slot write to the last row, which is never read
        self._no_slot = num_slots
        self._free = list(range(num_slots))
        self._slot_of_request: dict[str, int] = {}
        self._request_of_rollout: dict[str, str] = {}
        self._num_prompt_S = np.zeros(rows, np.int64)
        self._first_pooled_S = np.zeros(rows, np.int64)
        self._num_pooled_S = np.zeros(rows, np.int64)
        self._num_seen_S = np.zeros(rows, np.int64)
        self._step: _Step | None = None

        self._device = device
        self._think_table_SV = think_table_SV.to(device)
        self._think_state_S = torch.zeros(rows, dtype=torch.int64, device=device)
        self._think_end_S = torch.full((rows,), NEVER, dtype=torch.int64, device=device)
        self._think_hidden_Sd = torch.zeros(rows, hidden_size, device=device)
        self._prompt_sum_Sd = torch.zeros(rows, hidden_size, device=device)
        self._ring_tokens = response_pool_tokens + RUN_ON_TOKENS
        self._ring = torch.zeros(rows, self._ring_tokens, hidden_size, dtype=dtype, device=device)
        self._logprobs = torch.empty(rows, max_model_len, device=device)
        self._entropies = torch.empty(rows, max_model_len, device=device)
        self._sum_squared_probs = torch.empty(rows, max_model_len, device=device)
        self._window = torch.arange(response_pool_tokens, device=device)

    @property
    def num_open(self) -> int:
        """Number of rollouts with a slot."""
        return len(self._slot_of_request)

    def open(self, request_id: str, rollout_id: str, num_prompt_tokens: int, pool_tokens: int) -> None:
        """Assign a slot to a rollout. `prompt_hidden` will average the last `pool_tokens` of its prompt."""
        if request_id in self._slot_of_request or not self._free:
            return
        slot = self._free.pop()
        self._slot_of_request[request_id] = slot
        self._request_of_rollout[rollout_id] = request_id
        self._num_prompt_S[slot] = num_prompt_tokens
        self._first_pooled_S[slot] = max(0, num_prompt_tokens - pool_tokens)
        self._num_pooled_S[slot] = 0
        self._num_seen_S[slot] = 0
        self._think_state_S[slot] = 0
        self._think_end_S[slot] = NEVER
        self._prompt_sum_Sd[slot] = 0

    def record_hidden(
        self,
        request_ids: Sequence[str],
        num_computed_R: IntArray,
        num_scheduled_R: IntArray,
        token_ids_N: torch.Tensor,
        hidden_Nd: torch.Tensor,
    ) -> None:
        """Record the hidden states of a step's tokens.

        Tokens that vLLM computes again after a preemption are not recorded again. An exception is a prompt preempted
        before its end: it is pooled from the start, because the weights may have changed.
        """
        slots_R = np.array([self._slot_of_request.get(r, self._no_slot) for r in request_ids], np.int64)
        num_seen_R = self._num_seen_S[slots_R]
        restarted = slots_R[(num_computed_R < num_seen_R) & (num_seen_R < self._num_prompt_S[slots_R])]
        if restarted.size:
            self._num_seen_S[restarted] = self._num_pooled_S[restarted] = 0
            self._prompt_sum_Sd[self._to_device(restarted)] = 0
        num_after_R = num_computed_R + num_scheduled_R
        starts_R = np.cumsum(num_scheduled_R) - num_scheduled_R
        slots_N = np.repeat(slots_R, num_scheduled_R)
        positions_N = np.arange(slots_N.size) - np.repeat(starts_R - num_computed_R, num_scheduled_R)
        num_prompt_N = self._num_prompt_S[slots_N]
        new_N = positions_N >= self._num_seen_S[slots_N]
        in_prompt_N = positions_N < num_prompt_N

        pooled = np.flatnonzero(new_N & in_prompt_N & (positions_N >= self._first_pooled_S[slots_N]))
        if pooled.size:
            states = hidden_Nd[self._to_device(pooled)].float()
            self._prompt_sum_Sd.index_add_(0, self._to_device(slots_N[pooled]), states)
            self._num_pooled_S += np.bincount(slots_N[pooled], minlength=self._num_pooled_S.size)
        response = np.flatnonzero(new_N & ~in_prompt_N)
        if response.size:
            rows = self._to_device(response)
            indices = self._to_device((positions_N - num_prompt_N)[response])
            self._record_response(self._to_device(slots_N[response]), indices, token_ids_N[rows], hidden_Nd[rows])

        self._num_seen_S[slots_R] = np.maximum(self._num_seen_S[slots_R], num_after_R)
        self._step = _Step(slots_R, num_after_R - self._num_prompt_S[slots_R])

    def record_sampled(self, logits_RV: torch.Tensor, sampled_R: torch.Tensor, kept_R: NDArray[np.bool_]) -> None:
        """Record the statistics of the sampled tokens.

        Args:
            logits_RV: float32, after temperature and before truncation. Overwritten.
            sampled_R: sampled tokens.
            kept_R: False for requests whose token is discarded, because their prompt is not finished.
        """
        if self._step is None:
            return
        rows = np.flatnonzero(kept_R & (self._step.slots_R != self._no_slot))
        if not rows.size:
            return
        slots, indices = self._to_device(self._step.slots_R[rows]), self._to_device(self._step.sampled_R[rows])
        if rows.size < kept_R.size:
            kept = self._to_device(rows)
            logits_RV, sampled_R = logits_RV[kept], sampled_R[kept]
        statistics = TokenStatistics(logits_RV)
        self._logprobs[slots, indices] = statistics.logprobs(sampled_R)
        self._entropies[slots, indices] = statistics.entropies()
        self._sum_squared_probs[slots, indices] = statistics.sum_squared_probs()

    def collect(self, rollout_id: str, num_tokens: int, start: int, end: int) -> Record | None:
        """Return and free the record of a rollout of `num_tokens`, with states pooled over response [start, end).

        Returns None for a rollout without a slot, or if pooled prompt tokens did not go through the model.
        """
        slot = self._slot_of_rollout(rollout_id)
        if slot is None:
            return None
        num_pooled = self._num_prompt_S[slot] - self._first_pooled_S[slot]
        if self._num_pooled_S[slot] != num_pooled:
            self.drop(rollout_id)
            return None
        record = (
            _to_bytes(self._prompt_sum_Sd[slot] / int(num_pooled)),
            self._response_hidden(slot, start, end),
            _to_bytes(self._logprobs[slot, :num_tokens]),
            _to_bytes(self._entropies[slot, :num_tokens]),
            _to_bytes(self._sum_squared_probs[slot, :num_tokens]),
        )
        self.drop(rollout_id)
        return record

    def drop(self, rollout_id: str) -> None:
        """Free a rollout's slot, if it has one."""
        request_id = self._request_of_rollout.pop(rollout_id, None)
        if request_id is not None:
            self._free.append(self._slot_of_request.pop(request_id))

    def _record_response(
        self, slots: torch.Tensor, indices: torch.Tensor, token_ids: torch.Tensor, hidden: torch.Tensor
    ) -> None:
        """Record one response token per slot. Slots are distinct, because a rollout samples one token per step."""
        self._ring[slots, indices % self._ring_tokens] = hidden
        moved = self._think_table_SV[self._think_state_S[slots], token_ids].long()
        self._think_state_S[slots] = moved % NUM_STATES
        ended = moved >= ENDED
        if self._device.type == "cpu" and not ended.any():
            return
        # On a GPU pool for all slots: selecting those where the tag ended would synchronize with the device.
        pooled = self._pool(slots, indices + 1)
        self._think_hidden_Sd[slots] = torch.where(ended[:, None], pooled, self._think_hidden_Sd[slots])
        self._think_end_S[slots] = torch.where(ended, indices + 1, self._think_end_S[slots])

    def _pool(self, slots: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Return the mean of the states in the window before each end, [len(slots), d]."""
        indices = ends[:, None] - 1 - self._window
        is_valid = (indices >= 0).float()
        states = self._ring[slots[:, None], indices % self._ring_tokens].float()
        return torch.einsum("rwd,rw->rd", states, is_valid) / is_valid.sum(1, keepdim=True)

    def _response_hidden(self, slot: int, start: int, end: int) -> bytes:
        if start == end:
            return _to_bytes(torch.zeros_like(self._think_hidden_Sd[slot]))
        if int(self._think_end_S[slot]) == end:
            return _to_bytes(self._think_hidden_Sd[slot])
        num_recorded = int(self._num_seen_S[slot] - self._num_prompt_S[slot])
        if num_recorded < end or num_recorded - start > self._ring_tokens:
            return b""
        rows = torch.arange(start, end, device=self._device) % self._ring_tokens
        return _to_bytes(self._ring[slot, rows].float().mean(0))

    def _slot_of_rollout(self, rollout_id: str) -> int | None:
        request_id = self._request_of_rollout.get(rollout_id)
        return None if request_id is None else self._slot_of_request[request_id]

    def _to_device(self, array: IntArray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _to_bytes(values: torch.Tensor) -> bytes:
    return values.float().cpu().numpy().tobytes()
