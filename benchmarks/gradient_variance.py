"""How noisy is each algorithm's gradient, at the same policy and for the same number of sampled tokens?

Measures at two stages: the preset's model (`base`), and the same after some steps of training (`trained`). A stage has
fresh rollouts of one policy: groups of two for algorithms with one or two rollouts a prompt, groups of eight for the
others. With the exact gradient c of each group, averaged over its rollouts,

    noise   E‖c‖² − ‖G‖²
    signal  ‖G‖² = ‖E c‖², from products of different groups

This is E[‖g‖²(r − b)²] − ‖G‖² for one rollout a prompt and one baseline a rollout. A batch of twice the tokens has half
the noise, so noise is multiplied by the tokens of a group. Unbiased estimators have one G, measured with the estimator
of the least noise; PPO shares it, because its λ of 0.95 biases so short responses little. Algorithms that divide by a
standard deviation or drop groups have their own. The result is noise / signal.

Gradients are computed once and serve all estimators (`gradient_variance_gradients.py`), so the estimators are compared
on the same rollouts. Intervals are 95 %, by a bootstrap over prompts; those of ratios resample both sides together.

Each baseline knows what it would know in a run, from the rollouts of earlier steps: value services learn their labels,
SPO's trackers their rewards, and PPO's critic trains on them. Baselines of a step come from batches of `--batch`
rollouts. Also prints Spearman's correlation of Σω with the exact ‖∇log π‖² of a rollout. Rollouts and gradients are in
compare/gradient_variance; the same command resumes. Writes results/gradient_variance_PRESET.json.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from gradient_variance_data import Rollouts, estimates, prepare, run_of, split
from gradient_variance_gradients import Gradients, gradients_of
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from poise.algorithms.baselines import batch_mean
from poise.algorithms.group_baselines import group_mean, rloo
from poise.algorithms.score_weighted import squared_score_norms
from poise.learner.config import LearnerConfig
from poise.learner.distributed.process_group import World
from poise.learner.models.critic import Critic
from poise.learner.training.gradients import PreviousOutputs
from poise.learner.training.minibatch import MiniBatch, build_mini_batch
from poise.learner.training.packing import PromptGroup
from poise.local.run_file import LocalRun
from poise.orchestrator.algorithms.spo import SpoOptions
from poise.orchestrator.sampling.scored_groups import ScoredGroup
from poise_client.types import GroupBaselines

HERE = Path(__file__).parent
STAGES = ("base", "trained")
DEFAULTS = {
    "tiny": {"steps": 12, "pairs": 400, "eights": 200, "batch": 16, "critic": 1e-3},
    "smollm2": {"steps": 24, "pairs": 200, "eights": 48, "batch": 32, "critic": 1e-4},
}
ESTIMATORS = ("probe", "score_mean", "score_prefix", "score_prompt", "auto")
NUM_RESAMPLES = 2000

Doubles = NDArray[np.float64]
Advantages = list[list[Doubles]]
"""Of each group and rollout: one for each token, [T]."""


@dataclass(frozen=True)
class Method:
    """An algorithm's advantages on groups of `size` rollouts. Groups of one are the halves of the groups of two."""

    size: int
    advantages: Advantages
    has_common_signal: bool = True
    """Whether its gradient is that of the expected reward in expectation."""
    is_sequence_mean: bool = False
    """Whether the loss divides by the length of each response."""
    drops_equal: bool = False
    """Whether groups of equal rewards are dropped, and others sampled in their place."""


@dataclass(frozen=True)
class Contributions:
    """A method's gradients: of G groups."""

    squares_G: Doubles
    """Squared norm of the gradient of a group; with groups of one, the mean of both halves."""
    products_GG: Doubles
    """Inner products of the groups' mean gradients; the diagonal is not used."""
    tokens_G: Doubles
    kept_G: Doubles
    """1 for groups that are trained on, 0 for dropped ones, whose gradient is 0."""


def contributions(method: Method, groups: Sequence[ScoredGroup], gradients: Sequence[Gradients]) -> Contributions:
    squares, sketches, tokens, kept = [], [], [], []
    for item, gradient, rollouts in zip(groups, gradients, method.advantages, strict=True):
        lengths = [rollout.token_ids.size for rollout in item.group.rollouts]
        factors = [
            advantages / (length if method.is_sequence_mean else 1)
            for advantages, length in zip(rollouts, lengths, strict=True)
        ]
        by_token = len(gradient.products) == sum(lengths)
        rows = np.concatenate(factors) if by_token else np.array([each[0] for each in factors])
        owners = np.repeat(np.arange(len(lengths)), lengths if by_token else 1)
        parts = [np.where(owners == i, rows, 0.0) for i in range(len(lengths))] if method.size == 1 else [rows]
        parts = [part / method.size for part in parts]
        squares.append(np.mean([part @ gradient.products @ part for part in parts]))
        sketches.append(np.mean(parts, axis=0) @ gradient.sketch)
        tokens.append(sum(lengths) / len(parts))
        kept.append(0.0 if method.drops_equal and not np.any(rows) else 1.0)
    sketched = np.array(sketches, np.float64)
    return Contributions(np.array(squares), sketched @ sketched.T, np.array(tokens), np.array(kept))


def signals(own: Contributions, weights_BG: Doubles) -> Doubles:
    """Return ‖E c‖² of each resample, [B]."""
    products = own.products_GG - np.diag(np.diagonal(own.products_GG))
    pairs = weights_BG.sum(axis=1) ** 2 - np.square(weights_BG).sum(axis=1)
    return np.einsum("bg,gh,bh->b", weights_BG, products, weights_BG, optimize=True) / pairs


def ratios(own: Contributions, weights_BG: Doubles, signals_B: Doubles) -> tuple[Doubles, Doubles]:
    """Return noise and noise / signal at equal tokens of each resample, [B]."""
    weight = weights_BG.sum(axis=1)
    kept = weights_BG @ own.kept_G / weight
    # Of kept groups, squares, signal and tokens grow by 1 / kept, 1 / kept² and 1 / kept.
    noise = (weights_BG @ own.squares_G / weight) / kept - signals_B / kept**2
    return noise, noise / (signals_B / kept**2) * (weights_BG @ own.tokens_G / weight / kept)


def constant(groups: Sequence[ScoredGroup], advantages: Sequence[Doubles]) -> Advantages:
    """Give every token its rollout's advantage."""
    return [
        [
            np.full(rollout.token_ids.size, value, np.float64)
            for rollout, value in zip(g.group.rollouts, own, strict=True)
        ]
        for g, own in zip(groups, advantages, strict=True)
    ]


def in_batches(
    groups: Sequence[ScoredGroup], batch: int, advantages: Callable[[list[ScoredGroup]], list[Doubles]]
) -> Advantages:
    """Compute advantages in batches of rollouts. The last batch may be larger, up to twice."""
    size = max(1, batch // len(groups[0].rewards))
    starts = range(0, max(size, len(groups) - size + 1), size)
    ends = [*starts[1:], len(groups)]
    found = [each for s, e in zip(starts, ends, strict=True) for each in advantages(list(groups[s:e]))]
    return constant(groups, found)


def halves(pairs: Sequence[ScoredGroup], advantages: Callable[[list[ScoredGroup]], Advantages]) -> Advantages:
    """Compute advantages of groups of one, for the first and the second rollouts of pairs."""
    first, second = (advantages(split(pairs, sibling)) for sibling in (0, 1))
    return [[*one, *other] for one, other in zip(first, second, strict=True)]


def without_scale(rewards: Sequence[Any], baselines: Sequence[Any]) -> list[Doubles]:
    return [np.asarray(r, np.float64) - np.asarray(b, np.float64) for r, b in zip(rewards, baselines, strict=True)]


def rewards_of(groups: Sequence[ScoredGroup]) -> list[Any]:
    return [item.rewards for item in groups]


def estimated(groups: Sequence[ScoredGroup], answers: Sequence[GroupBaselines]) -> Advantages:
    """Return reward − baseline, with one baseline for each rollout or each token."""
    result = []
    for item, answer in zip(groups, answers, strict=True):
        baselines = answer.token_baselines or answer.baselines
        if baselines is None:
            raise click.ClickException(f"no baselines for group {answer.group_id}: the estimator has no fit")
        result.append(
            [
                np.full(rollout.token_ids.size, reward, np.float64) - baseline
                for rollout, reward, baseline in zip(item.group.rollouts, item.rewards, baselines, strict=True)
            ]
        )
    return result


def spo(earlier: Sequence[Sequence[ScoredGroup]], batch: int) -> Callable[[list[ScoredGroup]], Advantages]:
    """Return SPO's advantages without its division by the batch's standard deviation."""
    algorithm = SpoOptions().make(0)
    for groups in earlier:
        algorithm.load_step_state(algorithm.step_state(groups))

    async def never() -> list[GroupBaselines]:
        raise AssertionError

    def of_batch(groups: list[ScoredGroup]) -> list[Doubles]:
        found = asyncio.run(algorithm.baselines(groups, never))
        size = len(groups)  # subtracting the batch's mean, which contains the own reward, scales the gradient
        return [each * size / (size - 1) for each in without_scale(rewards_of(groups), found.baselines)]

    return lambda groups: in_batches(groups, batch, of_batch)


class Ppo:
    """PPO's critic, trained on earlier steps in batches of one update."""

    def __init__(self, run: LocalRun, learning_rate: float, batch: int) -> None:
        critic = {"learning_rate": learning_rate, "warmup_updates": 4}
        self._config = LearnerConfig(**(run.learner.model_dump() | {"critic": critic, "mini_batch_prompts": batch}))
        assert self._config.critic is not None
        settings = self._config.critic.model_copy(update={"whiten_advantages": False})
        self._world, self._batch = World(torch.device("cpu")), batch
        torch.manual_seed(0)
        self._critic = Critic(self._config, settings, self._world)

    def learn(self, earlier: Sequence[Sequence[ScoredGroup]]) -> None:
        groups = [group for step in earlier for group in step]
        size = self._batch // len(groups[0].rewards)
        for update, start in enumerate(range(0, len(groups) - size + 1, size)):
            mini_batch = self._mini_batch(groups[start : start + size])
            (targets,), explained = self._critic.targets([mini_batch])
            self._critic.optimizer.zero_grad()
            self._critic.backward(mini_batch, [PreviousOutputs(critic=each) for each in targets])
            self._critic.optimizer.clip()
            self._critic.optimizer.step(update)
            if update % 8 == 7:
                click.echo(f"critic: {start + size} of {len(groups)} groups, {explained:.2f} explained", err=True)

    def advantages(self, groups: list[ScoredGroup]) -> Advantages:
        """Return advantages minus their mean over a batch, as whitening does, but without its scale."""
        result: Advantages = []
        for start in range(0, len(groups), self._batch):
            part = groups[start : start + self._batch]
            found = []
            for item in part:  # one row for each, to know its tokens
                (targets,), _ = self._critic.targets([self._mini_batch([item])])
                found.append(targets[0].advantages_N.double().numpy())
            tokens = np.concatenate(found)
            result += [[(each - tokens.mean()) * tokens.size / (tokens.size - 1)] for each in found]
        return result

    def _mini_batch(self, groups: Sequence[ScoredGroup]) -> MiniBatch:
        prompts = [
            PromptGroup(
                item.group.prompt_token_ids,
                tuple(
                    dataclasses.replace(rollout, reward=float(reward))
                    for rollout, reward in zip(item.group.rollouts, item.rewards, strict=True)
                ),
            )
            for item in groups
        ]
        return build_mini_batch(prompts, self._config, self._world)


def all_methods(folder: Path, preset: str, rollouts: Rollouts, options: dict[str, Any]) -> dict[str, Method]:
    pairs, eights, batch = rollouts.pairs, rollouts.eights, int(options["batch"])

    def none(groups: list[ScoredGroup]) -> Advantages:
        return constant(groups, rewards_of(groups))

    def other_prompts(groups: list[ScoredGroup]) -> Advantages:
        return in_batches(groups, batch, lambda part: without_scale(rewards_of(part), batch_mean(rewards_of(part))))

    def grpo(groups: Sequence[ScoredGroup]) -> Advantages:
        scaled = group_mean(rewards_of(groups), divide=True)
        assert scaled.scales
        own = without_scale(rewards_of(groups), scaled.baselines)
        return constant(groups, [a / s for a, s in zip(own, scaled.scales, strict=True)])

    def rloo_of(groups: Sequence[ScoredGroup]) -> Advantages:
        return constant(groups, without_scale(rewards_of(groups), rloo(rewards_of(groups)).baselines))

    methods = {
        "none-1": Method(1, halves(pairs, none)),
        "batch_mean-1": Method(1, halves(pairs, other_prompts)),
        "spo-1": Method(1, halves(pairs, spo(rollouts.earlier, batch))),
        "rloo-2": Method(2, rloo_of(pairs)),
        "rloo-8": Method(8, rloo_of(eights)),
        "grpo-8": Method(8, grpo(eights), has_common_signal=False, is_sequence_mean=True),
        "dapo-8": Method(8, grpo(eights), has_common_signal=False, drops_equal=True),
    }
    for estimator in options["estimators"]:
        if estimator == "probe":
            answers = asyncio.run(estimates(folder, preset, estimator, rollouts.earlier, pairs))
            methods["poise-2 probe"] = Method(2, estimated(pairs, answers))
            continue
        singles = [*split(pairs, 0), *split(pairs, 1)]
        found = estimated(singles, asyncio.run(estimates(folder, preset, estimator, rollouts.earlier, singles)))
        own = [[*one, *other] for one, other in zip(found[: len(pairs)], found[len(pairs) :], strict=True)]
        methods[f"poise-1 {estimator}"] = Method(1, own)
        methods[f"poise-2 {estimator}"] = Method(2, own)
    if options["critic"]:
        ppo = Ppo(run_of(folder, preset), options["critic"], batch)
        ppo.learn(rollouts.earlier)
        methods["ppo-1"] = Method(1, halves(pairs, ppo.advantages))
    return methods


def measure(folder: Path, preset: str, stage: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the results of one stage."""
    folder.mkdir(parents=True, exist_ok=True)
    rollouts = prepare(folder, preset, stage == "trained", options["steps"], options["pairs"], options["eights"])
    run = run_of(folder, preset)
    learner = LearnerConfig(**(run.learner.model_dump() | {"model": rollouts.model, "gradient_checkpointing": False}))
    temperature = run.train.sampling.temperature
    gradients = {
        2: gradients_of(folder / "gradients", "pairs", rollouts.pairs, learner, temperature, by_token=True),
        8: gradients_of(folder / "gradients", "eights", rollouts.eights, learner, temperature, by_token=False),
    }
    groups = {2: rollouts.pairs, 8: rollouts.eights}
    methods = all_methods(folder, preset, rollouts, options)
    found = {
        name: contributions(each, groups[max(2, each.size)], gradients[max(2, each.size)])
        for name, each in methods.items()
    }
    random = np.random.default_rng(0)
    weights = {
        size: np.concatenate(
            [np.ones((1, len(of))), random.multinomial(len(of), [1 / len(of)] * len(of), NUM_RESAMPLES)]
        )
        for size, of in groups.items()
    }  # the first row is the sample itself
    quietest = min(
        (name for name, each in methods.items() if each.has_common_signal and each.size < 8),
        key=lambda name: found[name].squares_G.mean() * methods[name].size,
    )
    common = signals(found[quietest], weights[2])
    values = {}
    for name, method in methods.items():
        own_weights = weights[max(2, method.size)]
        own_signal = common if method.has_common_signal else signals(found[name], own_weights)
        values[name] = (own_signal, *ratios(found[name], own_weights, own_signal))
    results = {
        name: {
            "signal": _interval(signal),
            "noise": _interval(noise),
            "noise_over_signal": _interval(ratio),
            "tokens": float(found[name].tokens_G.mean()),
            **{
                f"vs_{other}": _interval(ratio / values[other][2])
                for other in ("poise-2 probe", "ppo-1", "grpo-8", "none-1", "batch_mean-1")
                if other in values
            },
        }
        for name, (signal, noise, ratio) in values.items()
    }
    return {
        "num_rollouts": 2 * len(rollouts.pairs),
        "reward": float(np.mean([each.rewards.mean() for each in rollouts.pairs])),
        "mean_tokens": float(np.mean([r.token_ids.size for g in rollouts.pairs for r in g.group.rollouts])),
        "signal_from": quietest,
        "spearman": rank_correlation(rollouts.pairs, gradients[2]),
        "results": results,
    }


def rank_correlation(pairs: Sequence[ScoredGroup], gradients: Sequence[Gradients]) -> float:
    """Return Spearman's correlation of Σω with the exact squared gradient norm of each rollout."""
    sums, norms = [], []
    for item, gradient in zip(pairs, gradients, strict=True):
        start = 0
        for rollout in item.group.rollouts:
            end = start + rollout.token_ids.size
            squares = rollout.sum_squared_probs.astype(np.float32)
            sums.append(float(squared_score_norms(rollout.logprobs, squares).sum()))
            norms.append(float(gradient.products[start:end, start:end].sum()))
            start = end
    return float(spearmanr(sums, norms).statistic)


def _interval(values_B: Doubles) -> list[float]:
    """Return the sample's value and the bounds of its 95 % interval."""
    return [float(values_B[0]), *map(float, np.percentile(values_B[1:], [2.5, 97.5]))]


def show(stage: str, tree: dict[str, Any]) -> None:
    about = f"{stage}: {tree['num_rollouts']} rollouts, reward {tree['reward']:.2f}, Spearman {tree['spearman']:.2f}"
    table = Table(title=about)
    columns = ["signal", "noise", "vs_poise-2 probe", "vs_ppo-1", "vs_grpo-8", "vs_none-1"]
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    for name, one in sorted(tree["results"].items(), key=lambda named: named[1]["noise_over_signal"][0]):
        cells = [f"{one[c][0]:.3g} ({one[c][1]:.3g} to {one[c][2]:.3g})" if c in one else "-" for c in columns]
        table.add_row(name, *cells)
    Console(width=180).print(table)
    click.echo("| | / POISE-2 | / PPO | / GRPO |\n|---|---|---|---|")
    for name, one in tree["results"].items():
        keys = ("vs_poise-2 probe", "vs_ppo-1", "vs_grpo-8")
        cells = [f"{one[k][0]:.2f} ({one[k][1]:.2f} to {one[k][2]:.2f})" if k in one else "–" for k in keys]
        click.echo(f"| {name} | {' | '.join(cells)} |")


@click.command()
@click.option("--preset", type=click.Choice(list(DEFAULTS)), default="tiny", show_default=True)
@click.option("--stage", "stages", multiple=True, type=click.Choice(STAGES), default=STAGES, show_default=True)
@click.option("--steps", type=int, help="Earlier steps; in the second stage the policy is trained on them.")
@click.option("--pairs", type=int, help="Fresh groups of two.")
@click.option("--eights", type=int, help="Fresh groups of eight.")
@click.option("--batch", type=int, help="Rollouts of a batch, for baselines from other prompts.")
@click.option("--estimator", "estimators", multiple=True, type=click.Choice(ESTIMATORS), default=ESTIMATORS)
@click.option("--no-ppo", is_flag=True, help="Leave out PPO, whose critic takes long to train.")
@click.option("--dir", "root", type=click.Path(path_type=Path), default=Path("compare/gradient_variance"))
@click.option("--out", type=click.Path(path_type=Path), help="Result file.")
def main(
    preset: str,
    stages: tuple[str, ...],
    estimators: tuple[str, ...],
    no_ppo: bool,
    root: Path,
    out: Path | None,
    **given: Any,
) -> None:
    options = DEFAULTS[preset] | {name: value for name, value in given.items() if value is not None}
    options |= {"estimators": estimators} | ({"critic": 0.0} if no_ppo else {})
    torch.set_num_threads(1 if preset == "tiny" else torch.get_num_threads())
    path = out or HERE / "results" / f"gradient_variance_{preset}.json"
    trees = {}
    for stage in stages:
        trees[stage] = measure(root.resolve() / f"{preset}-{stage}", preset, stage, options)
        show(stage, trees[stage])
    figures = {}
    for stage, tree in trees.items():
        ours = [name for name in tree["results"] if name.startswith("poise-1")]
        for name in ours:
            for other in ("poise-2 probe", "ppo-1"):
                if f"vs_{other}" in tree["results"][name]:
                    figures[f"{stage}_{name.split()[1]}_vs_{other.split()[0]}"] = tree["results"][name][f"vs_{other}"][
                        0
                    ]
    path.write_text(json.dumps({"figures": figures, "settings": options, "stages": trees}, indent=1) + "\n")
    click.echo(f"wrote {path}")


if __name__ == "__main__":
    main()
