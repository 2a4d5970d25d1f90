"""The recorder against plain lists of states, over random schedules of prefills, decodes and preemptions."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from poise.algorithms.features import POOL_TOKENS
from poise.generation.engines.vllm.recorder import RUN_ON_TOKENS, Recorder
from poise.generation.engines.vllm.think_tokens import think_close_table

WIDTH = 3
TEXTS = ["a", "b", "</think>", "</thi", "nk>"]


def make_recorder(num_slots: int = 4, pool_tokens: int = POOL_TOKENS) -> Recorder:
    return Recorder(
        num_slots=num_slots,
        response_pool_tokens=pool_tokens,
        hidden_size=WIDTH,
        max_model_len=400,
        think_table_SV=torch.from_numpy(think_close_table(TEXTS)),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def state_of(rollout: int, position: int) -> list[float]:
    return [float(rollout), float(position), float(position % 7)]


class Rollout:
    """One request as a scheduler drives it."""

    def __init__(self, index: int, num_prompt: int, tokens: list[int]) -> None:
        self.index = index
        self.num_prompt = num_prompt
        self.tokens = tokens
        self.num_sampled = 0
        self.computed = 0

    @property
    def remaining(self) -> int:
        return self.num_prompt + self.num_sampled - self.computed

    def token_at(self, position: int) -> int:
        return 0 if position < self.num_prompt else self.tokens[position - self.num_prompt]


def run_step(recorder: Recorder, parts: list[tuple[Rollout, int]]) -> None:
    """Compute `count` tokens of each rollout, and sample where that reaches its last."""
    positions = [(r, r.computed + i) for r, count in parts for i in range(count)]
    recorder.record_hidden(
        [f"request-{r.index}" for r, _ in parts],
        np.array([r.computed for r, _ in parts], np.int64),
        np.array([count for _, count in parts], np.int64),
        torch.tensor([r.token_at(p) for r, p in positions], dtype=torch.int32),
        torch.tensor([state_of(r.index, p) for r, p in positions]),
    )
    logits = torch.tensor([[r.index, r.num_sampled, 0.0, 1.0, 2.0] for r, _ in parts])
    kept = np.array([count == r.remaining for r, count in parts])
    sampled = [r.tokens[min(r.num_sampled, len(r.tokens) - 1)] for r, _ in parts]
    recorder.record_sampled(logits, torch.tensor(sampled, dtype=torch.int32), kept)
    for (r, count), samples in zip(parts, kept, strict=True):
        r.computed += count
        r.num_sampled += bool(samples)


def open_rollout(recorder: Recorder, rollout: Rollout, pool_tokens: int = POOL_TOKENS) -> Rollout:
    recorder.open(f"request-{rollout.index}", f"rollout-{rollout.index}", rollout.num_prompt, pool_tokens)
    return rollout


def collect(recorder: Recorder, rollout: Rollout, start: int, end: int) -> list[np.ndarray]:
    record = recorder.collect(f"rollout-{rollout.index}", rollout.num_sampled, start, end)
    assert record is not None
    return [np.frombuffer(part, np.float32) for part in record]


def mean_states(rollout: Rollout, positions: range) -> np.ndarray:
    return np.mean([state_of(rollout.index, p) for p in positions], axis=0)


@pytest.mark.parametrize("seed", range(20))
def test_any_schedule_leaves_the_same_record(seed: int) -> None:
    rng = random.Random(seed)
    pool_tokens = rng.choice([1, POOL_TOKENS, 40])
    recorder = make_recorder(pool_tokens=pool_tokens)
    rollouts = [
        open_rollout(recorder, Rollout(i, rng.randint(1, 40), rng.choices([0, 1], k=rng.randint(1, 60))))
        for i in range(4)
    ]
    while running := [r for r in rollouts if r.num_sampled < len(r.tokens)]:
        for rollout in running:
            if rollout.computed and rng.random() < 0.05:
                rollout.computed = 0  # preempted: all its tokens are computed again
        chosen = rng.sample(running, rng.randint(1, len(running)))
        run_step(recorder, [(r, r.remaining if rng.random() < 0.7 else rng.randint(1, r.remaining)) for r in chosen])
    for rollout in rollouts:
        num_tokens = len(rollout.tokens)
        end = num_tokens - 1
        start = max(0, end - pool_tokens)
        prompt, response, logprobs, entropies, squares = collect(recorder, rollout, start, end)
        first = max(0, rollout.num_prompt - POOL_TOKENS)
        np.testing.assert_allclose(prompt, mean_states(rollout, range(first, rollout.num_prompt)), rtol=1e-5)
        expected = np.zeros(WIDTH)
        if end:
            expected = mean_states(rollout, range(rollout.num_prompt + start, rollout.num_prompt + end))
        np.testing.assert_allclose(response, expected, rtol=1e-5)
        distributions = torch.log_softmax(
            torch.tensor([[rollout.index, i, 0.0, 1.0, 2.0] for i in range(num_tokens)]), -1
        )
        np.testing.assert_allclose(logprobs, distributions[range(num_tokens), rollout.tokens], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(entropies, -(distributions.exp() * distributions).sum(-1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(squares, distributions.exp().square().sum(-1), rtol=1e-5)
    assert recorder.num_open == 0


def sample_whole(recorder: Recorder, rollout: Rollout) -> Rollout:
    run_step(recorder, [(rollout, rollout.num_prompt)])
    while rollout.num_sampled < len(rollout.tokens):
        run_step(recorder, [(rollout, 1)])
    return rollout


@pytest.mark.parametrize("pool_tokens", [3, POOL_TOKENS, 20])
@pytest.mark.parametrize("tag", [[2], [3, 4]])
def test_states_before_the_last_tag_survive_a_long_answer(tag: list[int], pool_tokens: int) -> None:
    recorder = make_recorder(pool_tokens=pool_tokens)
    tokens = [*[0] * 4, *tag, *[1] * 20, *tag, *[0] * 200]
    rollout = sample_whole(recorder, open_rollout(recorder, Rollout(0, 5, tokens)))
    end = 24 + 2 * len(tag)
    _, response, *_ = collect(recorder, rollout, end - pool_tokens, end)
    np.testing.assert_allclose(response, mean_states(rollout, range(5 + end - pool_tokens, 5 + end)), rtol=1e-5)


def test_early_tag_pools_the_states_before_it() -> None:
    recorder = make_recorder()
    rollout = sample_whole(recorder, open_rollout(recorder, Rollout(0, 5, [0, 2, *[0] * 100])))
    _, response, *_ = collect(recorder, rollout, 0, 2)
    np.testing.assert_allclose(response, mean_states(rollout, range(5, 7)), rtol=1e-5)


def test_overwritten_window_is_not_returned() -> None:
    for num_run_on, held in ((RUN_ON_TOKENS, True), (RUN_ON_TOKENS + 1, False)):
        recorder = make_recorder()
        rollout = sample_whole(recorder, open_rollout(recorder, Rollout(0, 5, [0] * (31 + num_run_on))))
        rollout.num_sampled = 31  # where the stop string was; the last sampled token never becomes a state
        _, response, logprobs, *_ = collect(recorder, rollout, 20, 30)
        assert logprobs.size == 31
        assert (response.size == WIDTH) is held
        if held:
            np.testing.assert_allclose(response, mean_states(rollout, range(25, 35)), rtol=1e-5)


def test_slots_are_reused_clean() -> None:
    recorder = make_recorder(num_slots=1)
    for index in range(3):
        rollout = open_rollout(recorder, Rollout(index, 12, [0, 2, 1]), pool_tokens=4)
        assert recorder.num_open == 1
        sample_whole(recorder, rollout)
        prompt, *_ = collect(recorder, rollout, 0, 2)
        np.testing.assert_allclose(prompt, mean_states(rollout, range(8, 12)), rtol=1e-5)
        assert recorder.num_open == 0


def test_dropped_rollouts_free_their_slots_while_running() -> None:
    recorder = make_recorder(num_slots=1)
    doomed = open_rollout(recorder, Rollout(0, 3, [0] * 9))
    run_step(recorder, [(doomed, 3)])
    recorder.drop("rollout-0")
    recorder.drop("rollout-0")
    kept = open_rollout(recorder, Rollout(1, 3, [1, 1, 1]))
    run_step(recorder, [(doomed, 1), (kept, 3)])
    run_step(recorder, [(kept, 1), (doomed, 1)])
    run_step(recorder, [(kept, 1)])
    _, response, *_ = collect(recorder, kept, 0, 2)
    np.testing.assert_allclose(response, mean_states(kept, range(3, 5)), rtol=1e-5)
    assert recorder.num_open == 0


def test_rollout_beyond_the_slots_disturbs_no_other() -> None:
    recorder = make_recorder(num_slots=1)
    kept, beyond = (open_rollout(recorder, Rollout(i, 3, [1, 1, 1])) for i in range(2))
    run_step(recorder, [(beyond, 3), (kept, 3)])
    for _ in range(2):
        run_step(recorder, [(beyond, 1), (kept, 1)])
    assert recorder.collect("rollout-1", 3, 0, 2) is None
    _, response, *_ = collect(recorder, kept, 0, 2)
    np.testing.assert_allclose(response, mean_states(kept, range(3, 5)), rtol=1e-5)


@pytest.mark.parametrize(("num_cached", "is_returned"), [(16, True), (20, True), (21, False), (29, False)])
def test_prompt_with_cached_pooled_tokens_is_not_returned(num_cached: int, is_returned: bool) -> None:
    recorder = make_recorder()
    reading, whole = (open_rollout(recorder, Rollout(i, 30, [0, 0]), pool_tokens=10) for i in range(2))
    reading.computed = num_cached
    run_step(recorder, [(whole, 30), (reading, reading.remaining)])
    run_step(recorder, [(reading, 1), (whole, 1)])
    if is_returned:
        prompt, *_ = collect(recorder, reading, 0, 1)
        np.testing.assert_allclose(prompt, mean_states(reading, range(20, 30)), rtol=1e-5)
    else:
        assert recorder.collect("rollout-0", 2, 0, 1) is None
    prompt, *_ = collect(recorder, whole, 0, 1)
    np.testing.assert_allclose(prompt, mean_states(whole, range(20, 30)), rtol=1e-5)
    assert recorder.num_open == 0


def test_preempted_prompt_is_pooled_from_its_second_pass_only() -> None:
    """The weights may have changed between the passes."""
    recorder = make_recorder()
    rollout = open_rollout(recorder, Rollout(0, 30, [0, 0]), pool_tokens=10)
    recorder.record_hidden(
        ["request-0"], np.array([0]), np.array([25]), torch.zeros(25, dtype=torch.int32), torch.full((25, WIDTH), 9.0)
    )
    rollout.computed = 8  # preempted, and its beginning cached since
    run_step(recorder, [(rollout, 14)])
    run_step(recorder, [(rollout, 8)])
    run_step(recorder, [(rollout, 1)])
    prompt, *_ = collect(recorder, rollout, 0, 1)
    np.testing.assert_allclose(prompt, mean_states(rollout, range(20, 30)), rtol=1e-5)


def test_memory_does_not_depend_on_the_length() -> None:
    recorder = make_recorder()
    tensors = {name: value.data_ptr() for name, value in vars(recorder).items() if isinstance(value, torch.Tensor)}
    for index, length in zip(range(4), itertools.repeat(300), strict=False):
        sample_whole(recorder, open_rollout(recorder, Rollout(index, 50, [0] * length)))
    assert tensors == {
        name: value.data_ptr() for name, value in vars(recorder).items() if isinstance(value, torch.Tensor)
    }
