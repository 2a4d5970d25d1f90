"""Two steps of the real loop through the real services equal the same two written line by line with plain torch and
scikit-learn.

The first is a bootstrap step; the second takes its baselines from the probe that learnt from the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from poise.algorithms.features import locate_spans
from poise.local.run_file import LocalRun
from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.loop import TrainingLoop
from poise.orchestrator.rewards.pool import VerifierResult
from poise.orchestrator.sampling.service_clients import ServiceClients
from poise.orchestrator.storage.run_folder import RunFolder
from poise.orchestrator.tasks.problem import Problem
from poise_client import AsyncLearnerClient, AsyncValueClient
from poise_client.types import Batch, Group, GroupBaselines, Prompt, Rollout, Sampling, StepResult

NUM_PROMPTS, TEMPERATURE, MAX_TOKENS = 16, 0.8, 14
LAYER = 2  # round(0.53 x 4 layers)
TOKENIZER = []


@dataclass
class Reference:
    """What one rollout should have given."""

    prompt_hidden: torch.Tensor
    response_hidden: torch.Tensor
    entropies: tuple[float, float, float]
    """Means over the response, its reasoning and its answer."""
    logprobs: torch.Tensor


def reward(response: str, index: int) -> float:
    """Anything that depends on prompt and response."""
    return float((sum(response.encode()) + index) % 5 < 2 + index % 3)


class Outside:
    """What a run has around it: its problems, their verifier, and a watcher that looks away."""

    files = ()

    def problems(self, draw: int, num_prompts: int) -> list[Problem]:
        return [
            Problem("default", f"{'abcdefgh'[i % 8] * (1 + i % 5)} {draw} {i * 7}", str(i), "exact")
            for i in range(num_prompts)
        ]

    def num_drawn(self, draw: int) -> dict[str, int]:
        return {}

    def resume(self, draw: int, num_drawn: Mapping[str, int]) -> None:
        assert not num_drawn

    async def verify(self, problem: Problem, response: str, finish_reason: str) -> VerifierResult:
        return VerifierResult(reward(response, int(problem.answer)), None, 0.0)

    def on_sampled(self, step: int, done: int, total: int) -> None:
        pass

    def on_phase(self, step: int, name: str) -> None: ...

    def on_step_end(self, metrics: dict[str, Any]) -> None: ...

    def on_evaluation_end(self, line: dict[str, Any]) -> None: ...


class Overheard(ServiceClients):
    """The services, and what came from them last."""

    groups: list[Group]
    answers: list[GroupBaselines]
    result: StepResult

    async def sample(self, *args: Any) -> AsyncGenerator[Group, None]:
        self.groups = []
        async for group in super().sample(*args):
            self.groups.append(group)
            yield group
        self.groups.sort(key=lambda group: group.group_id)

    async def estimate_baselines(self, *args: Any) -> list[GroupBaselines]:
        self.answers = await super().estimate_baselines(*args)
        return self.answers

    async def submit_advantages(self, batch: Batch) -> StepResult:
        self.result = await super().submit_advantages(batch)
        return self.result


async def drive(run: LocalRun, services: Overheard, folder: Path, num_steps: int) -> dict[str, Any]:
    """Have the training loop go on to `num_steps`; return what metrics.jsonl says of the last."""
    config = OrchestratorConfig(
        run_id="exact",
        run_dir=folder,
        num_steps=num_steps,
        prompts_per_step=NUM_PROMPTS,
        algorithm={"kind": "poise", "bootstrap": "batch_mean"},
        tasks=run.train.tasks,
        sampling={"temperature": TEMPERATURE, "max_tokens": MAX_TOKENS},
        evaluation={"num_prompts": 0},
    )
    outside, run_folder = Outside(), RunFolder(folder)
    state = run_folder.open("exact", {})
    with contextlib.closing(run_folder):
        loop = TrainingLoop(config, run_folder, services, outside, outside, outside, asyncio.Event())
        assert await loop.run(state)
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def refer(
    model: transformers.LlamaForCausalLM, texts: Sequence[str], prompt: Sequence[int], response: Sequence[int]
) -> Reference:
    """One separate forward pass over prompt and response; features as the paper defines them.

    `texts` are the response's tokens. Where tags are in them is left to `locate_spans`, which has its own tests.
    """
    with torch.no_grad():
        out = model(torch.tensor([[*prompt, *response]]), output_hidden_states=True)
    hidden = out.hidden_states[LAYER + 1][0]
    spans = locate_spans(texts)
    start, end = len(prompt), len(prompt) + len(response) - 1  # the last sampled token is not pooled
    if spans.think_close_end is not None:
        end = min(end, start + spans.think_close_end)
    logprobs = torch.log_softmax(out.logits[0, start - 1 : -1] / TEMPERATURE, -1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    pooled = hidden[max(start, end - 10) : end]
    return Reference(
        prompt_hidden=hidden[max(0, start - 10) : start].mean(0),
        response_hidden=pooled.mean(0) if len(pooled) else torch.zeros(hidden.shape[1]),
        entropies=(
            float(entropies.mean()),
            *(
                float(entropies[span.start : span.end].mean()) if span else 0.0
                for span in (spans.reasoning, spans.answer)
            ),
        ),
        logprobs=logprobs[torch.arange(len(response)), torch.tensor(response)],
    )


def texts_of(rollout: Rollout) -> list[str]:
    return [TOKENIZER[0].decode([token]) for token in rollout.token_ids.tolist()]


def token_loss(logprob, old, rollout_logprob, advantage):
    """PPO clip, dual clip and truncated importance sampling, as DESIGN states them."""
    ratio = torch.exp(logprob - old)
    loss = torch.maximum(-advantage * ratio, -advantage * torch.clamp(ratio, 1 - 0.2, 1 + 0.28))
    if advantage < 0:
        loss = torch.minimum(loss, torch.tensor(-advantage * 10.0))
    return loss * min(math.exp(float(old) - float(rollout_logprob)), 2.0)


def reference_step(model, optimizer, groups: Sequence[Group], advantages: np.ndarray, first_update: int) -> float:
    """Train on mini-batches of eight prompts; return the mean loss of a token.

    `old` is the policy before all of them.
    """
    all_losses: list[float] = []
    old = {
        (group.group_id, rollout.id.rollout_index): refer(
            model, texts_of(rollout), group.prompt_token_ids.tolist(), rollout.token_ids.tolist()
        ).logprobs
        for group in groups
        for rollout in group.rollouts
    }
    for update, start in enumerate(range(0, NUM_PROMPTS, 8), first_update):
        losses = []
        for g, group in enumerate(groups[start : start + 8], start):
            for rollout in group.rollouts:
                ids, prompt = rollout.token_ids.tolist(), group.prompt_token_ids.tolist()
                logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
                logprobs = torch.log_softmax(logits, -1)[torch.arange(len(ids)), torch.tensor(ids)]
                before = old[group.group_id, rollout.id.rollout_index]
                advantage = float(advantages[g, rollout.id.rollout_index])
                losses += [token_loss(logprobs[t], before[t], rollout.logprobs[t], advantage) for t in range(len(ids))]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        all_losses += [float(loss.detach()) for loss in losses]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for parameters in optimizer.param_groups:
            parameters["lr"] = 1e-3 * min(1.0, (update + 1) / 4)
        optimizer.step()
    return float(np.mean(all_losses))


def reference_values(
    references: list[list[Reference]], rewards: np.ndarray, asked: list[list[Reference]]
) -> np.ndarray:
    """Fit PCA, standardisation and ridge to one step's rollouts; predict another's."""

    def columns(rows: list[list[Reference]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        flat = [reference for group in rows for reference in group]
        entropies = np.array([r.entropies for r in flat])
        return (
            np.stack([r.prompt_hidden.numpy() for r in flat]),
            np.stack([r.response_hidden.numpy() for r in flat]),
            entropies,
        )

    prompt, response, _ = columns(references)
    prompt_pca = PCA(4, svd_solver="full").fit(prompt)
    response_pca = PCA(6, svd_solver="full").fit(response)

    def derive(rows: list[list[Reference]]) -> np.ndarray:
        p, r, e = columns(rows)
        return np.concatenate([prompt_pca.transform(p), response_pca.transform(r), e], 1)

    scaler = StandardScaler().fit(derive(references))
    targets = rewards[:, ::-1].reshape(-1)  # of two siblings, the other's reward
    ridge = Ridge(alpha=2.0).fit(scaler.transform(derive(references)), targets)
    return np.clip(ridge.predict(scaler.transform(derive(asked))), 0, 1).reshape(-1, 2)


def rewards_of(groups: Sequence[Group]) -> np.ndarray:
    rows = [[reward(r.text, i) for r in group.rollouts] for i, group in enumerate(groups)]
    return np.array(rows, np.float32)


def check_rollouts(model, groups: Sequence[Group], version: int) -> list[list[Reference]]:
    references = []
    for group in groups:
        row = []
        for rollout in group.rollouts:
            ids, prompt = rollout.token_ids.tolist(), group.prompt_token_ids.tolist()
            expected = refer(model, texts_of(rollout), prompt, ids)
            torch.testing.assert_close(torch.tensor(rollout.logprobs), expected.logprobs, rtol=1e-4, atol=1e-5)
            features = rollout.features
            torch.testing.assert_close(
                torch.tensor(features.prompt_hidden), expected.prompt_hidden, rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                torch.tensor(features.response_hidden), expected.response_hidden, rtol=1e-4, atol=1e-5
            )
            stretches = (features.output_entropy, features.reasoning_entropy, features.answer_entropy)
            np.testing.assert_allclose([stretch.mean for stretch in stretches], expected.entropies, rtol=1e-4)
            assert {span.policy_version for span in rollout.version_spans} == {version}
            row.append(expected)
        references.append(row)
    return references


async def test_two_steps_of_the_loop_equal_the_same_steps_line_by_line(tiny_run: LocalRun, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = transformers.LlamaForCausalLM.from_pretrained(tiny_run.learner.model, dtype=torch.float32)
    TOKENIZER[:] = [transformers.AutoTokenizer.from_pretrained(tiny_run.learner.model)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05)
    endpoints = tiny_run.train.endpoints
    async with (
        AsyncValueClient(endpoints.value) as value,
        AsyncLearnerClient(endpoints.learner) as learner,
        Overheard(endpoints, asyncio.Event()) as services,
    ):
        # Step 0: no probe yet; the baseline is the other prompts' mean reward.
        numbers = await drive(tiny_run, services, tmp_path, 1)
        groups, result = services.groups, services.result
        first = check_rollouts(model, groups, 0)
        first_rewards = rewards_of(groups)
        assert 0.2 < first_rewards.mean() < 0.8
        assert all(answer.values is None for answer in services.answers)
        others = (first_rewards.sum() - first_rewards.sum(1, keepdims=True)) / (first_rewards.size - 2)
        assert (result.policy_version, result.metrics.num_updates, result.rejected) == (1, 2, ())
        assert all(replica.current for replica in result.replicas)
        loss = reference_step(model, optimizer, groups, first_rewards - others, first_update=0)
        np.testing.assert_allclose(numbers["learner"]["loss"], loss, rtol=1e-4, atol=1e-6)
        await check_weights(learner, model, "after-0")

        # Step 1: new weights; baselines from the probe fitted on step 0.
        await probe_fitted(value)
        numbers = await drive(tiny_run, services, tmp_path, 2)
        groups, answers = services.groups, services.answers
        second = check_rollouts(model, groups, 1)
        expected = reference_values(first, first_rewards, second)
        values = np.stack([answer.values for answer in answers])
        assert values.std() > 0.02
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-4)
        baselines = np.stack([answer.baselines for answer in answers])
        np.testing.assert_allclose(baselines, expected[:, ::-1], rtol=1e-3, atol=1e-4)
        assert services.result.policy_version == 2
        loss = reference_step(model, optimizer, groups, rewards_of(groups) - baselines, first_update=2)
        np.testing.assert_allclose(numbers["learner"]["loss"], loss, rtol=1e-4, atol=1e-6)
        await check_weights(learner, model, "after-1")

        prompts = [Prompt("00000", "what is served now")]
        sampling = Sampling(temperature=TEMPERATURE, max_tokens=MAX_TOKENS)
        async with contextlib.aclosing(services.sample("exact", 2, prompts, 2, sampling, 2)) as served:
            check_rollouts(model, [group async for group in served], 2)


async def probe_fitted(value: AsyncValueClient) -> None:
    deadline = time.monotonic() + 60
    while not any(probe.probe_version for probe in (await value.get_probe()).probes):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def check_weights(learner: AsyncLearnerClient, model: torch.nn.Module, name: str) -> None:
    export = await learner.export_model(name)
    trained = transformers.LlamaForCausalLM.from_pretrained(Path(export.path), dtype=torch.float32)
    start = transformers.LlamaForCausalLM.from_pretrained(model.config.name_or_path, dtype=torch.float32)
    for (key, got), expected, before in zip(
        trained.named_parameters(), model.parameters(), start.parameters(), strict=True
    ):
        assert (expected - before).abs().max() > 1e-4, f"{key} was not trained"
        # Adam divides by the gradient's size: where that is rounding noise, a hundredth of a step is left to chance.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")
        assert (got - expected).abs().mean() < 2e-8, key
