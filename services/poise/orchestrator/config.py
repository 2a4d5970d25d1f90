"""Settings of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from poise.orchestrator.algorithms.poise import PoiseOptions
from poise.orchestrator.algorithms.registry import AlgorithmConfig
from poise.orchestrator.budget import Limits
from poise.orchestrator.rewards.config import VerifierConfig
from poise.orchestrator.tasks.config import TaskConfig
from poise.orchestrator.tasks.rows import OnBadRow
from poise.runtime.config.settings import LoggingConfig, Settings, StrictModel, TracingConfig
from poise.runtime.network.discovery import parse_name

MIN_TEMPERATURE = 0.01
"""Lowest temperature above 0 at which the generation service samples."""


class EndpointsConfig(StrictModel):
    """Where the services are."""

    generation: tuple[str, ...] = Field(("127.0.0.1:50051",), min_length=1)
    """Generation replicas: `host:port`, or `dns:///name:port` for all addresses of a name. Names are resolved
    repeatedly, so replicas may come and go during a run. Prompts go to the replica with the fewest expected tokens."""
    rollouts_per_replica: int = Field(256, ge=1)
    """Maximum number of rollouts assigned to a replica at a time. Set it above the number that a replica samples
    concurrently, to keep it busy. Other prompts wait for the first free replica."""
    value: str = "127.0.0.1:50052"
    """Value service, `host:port`."""
    learner: str = "127.0.0.1:50053"
    """Learner service, `host:port`."""
    token_file: Path | None = None
    """File with the bearer token of the services."""
    ca_file: Path | None = None
    """PEM file of the CAs that sign the services' certificates. Set it to use TLS."""
    use_proxy: bool = False
    """Connect through the proxy in `http_proxy` and similar variables. By default these are ignored."""

    @field_validator("generation", "value", "learner")
    @classmethod
    def _check_targets(cls, targets: tuple[str, ...] | str) -> tuple[str, ...] | str:
        for target in (targets,) if isinstance(targets, str) else targets:
            parse_name(target)
        return targets


class SamplingConfig(StrictModel):
    """Sampling of training rollouts."""

    temperature: float = Field(1.0, ge=MIN_TEMPERATURE, le=100)
    """Temperature of sampling and of the loss."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Probability mass of nucleus sampling. Below 1 the loss no longer matches the sampling distribution exactly."""
    max_tokens: int = Field(256, ge=1)
    """Maximum number of tokens in a response."""
    stop: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = Field((), max_length=16)
    """Strings that end a response, at most 16. Special tokens are allowed, such as `<|im_end|>`."""
    stop_token_ids: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field((), max_length=16)
    """Ids of further tokens that end a response, besides the model's own; at most 16."""


class EvaluationConfig(StrictModel):
    """Evaluation on held-out prompts."""

    num_prompts: int = Field(128, ge=0)
    """Number of held-out prompts; 0 disables evaluation."""
    rollouts_per_prompt: int = Field(4, ge=1, le=256)
    """Rollouts of each prompt. pass@k is reported for k = 1, 2, 4, … up to this number."""
    final_rollouts_per_prompt: int | None = Field(None, ge=1, le=256)
    """Rollouts of each prompt in the evaluation after training; null uses `rollouts_per_prompt`. Raise it to get pass@k
    for larger k without slowing down the evaluations before."""
    temperature: float = Field(1.0, ge=0, le=100)
    """Temperature; 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Probability mass of nucleus sampling."""
    pass_threshold: float = Field(1.0, gt=0, le=1)
    """Minimum reward of a passing rollout in pass@k."""
    every_steps: int = Field(0, ge=0)
    """Interval between evaluations, in steps; 0 evaluates only before and after training."""
    every_tokens: int = Field(0, ge=0)
    """Interval between evaluations, in response tokens sampled for training; 0 is off. Use it to compare algorithms at
    equal numbers of tokens."""
    every_wall_s: float = Field(0.0, ge=0)
    """Interval between evaluations, in seconds of training; 0 is off."""

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, temperature: float) -> float:
        if 0 < temperature < MIN_TEMPERATURE:
            raise ValueError(f"is {temperature:g}; must be 0 (greedy), or {MIN_TEMPERATURE:g} to 100")
        return temperature


class BudgetConfig(StrictModel):
    """Limits of the run besides `num_steps`. It ends after the step that reaches the first of them."""

    tokens: int | None = Field(None, ge=1)
    """Response tokens sampled for training, including groups that the algorithm drops; null is no limit."""
    wall_s: float | None = Field(None, gt=0)
    """Seconds of training, including earlier starts of the run but not evaluations; null is no limit."""


class OrchestratorConfig(Settings):
    """A training run."""

    model_config = SettingsConfigDict(env_prefix="POISE_TRAIN_")

    RENAMED: ClassVar[Mapping[str, str]] = {"settle_probe_s": "wait_for_labels_s"}

    run_id: str = Field("run", pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")
    """Name of the run, part of every rollout id. The same name resumes a run; a new run needs a new name."""
    run_dir: Path
    """Folder of the run: metrics, rollouts, journal, report."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the run. It determines the prompts and the sampling seeds of every step."""
    num_steps: int = Field(500, ge=1)
    """Number of steps in the run."""
    budget: BudgetConfig = BudgetConfig()
    """Other limits of the run."""
    prompts_per_step: int = Field(256, ge=1, le=4096)
    """Number of prompts per step."""
    rollouts_per_prompt: int | None = Field(None, ge=1, le=256)
    """Number of rollouts per prompt (the group size); null uses the algorithm's default: 2 for `poise` with
    the probe, 1 for `poise` with other estimators, `none`, `batch_mean`, `spo` and `ppo`, 8 for the others."""
    algorithm: AlgorithmConfig = PoiseOptions()
    """The algorithm: its name, or its name as `kind` with its options. The formulas are in
    docs/reference/algorithms.md."""
    max_staleness: int = Field(0, ge=0, le=64)
    """Maximum number of steps sampled ahead of the learner, and so the maximum staleness of their rollouts in policy
    versions. 0 is exactly on-policy: sampling and training alternate. Must not exceed the learner's own max_staleness;
    run.yaml sets both."""
    max_untrained_steps: int = Field(5, ge=1)
    """The run fails with status 1 and the reason after this many steps in a row that trained nothing. A step trains
    nothing if the learner rejects all rollouts, no update is finite, the verifier fails on all rollouts, or the
    algorithm drops all groups. A run also fails if none of its steps trained anything."""
    max_mismatch_kl: float | None = Field(0.05, gt=0)
    """Largest KL divergence between engine and learner in the first step, in nats per token: the mean of
    exp(d) − 1 − d, where d is the learner's log-probability minus the engine's. Above it they compute different models,
    and the run fails. Rounding gives about 1e-9 in float32, and 0.001 to 0.01 with an engine in bfloat16. Null disables
    the check."""
    wait_for_labels_s: float = Field(30.0, ge=0, le=600)
    """Before requesting baselines, wait up to this many seconds until the probe is fitted on all labels of earlier
    steps. The wait is usually short, because labels are published before the learner trains. It makes runs
    reproducible, even across restarts (docs/how_to/resume_exactly.md). Used only if `max_staleness` is 0. 0 disables
    the wait."""
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    """Tasks to train on, mixed by weight."""
    on_bad_row: OnBadRow = "stop"
    """How to handle invalid rows of data files (invalid JSON, too long for the model, rejected by its chat template):
    `stop` fails before the first step and lists them; `skip` leaves them out and reports their number."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling of training rollouts."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation on held-out prompts."""
    verifier: VerifierConfig = VerifierConfig()
    """Verifier processes and their limits."""
    endpoints: EndpointsConfig = EndpointsConfig()
    """Where the services are."""
    samples_per_step: int = Field(4, ge=0)
    """Number of groups per step to write to rollouts.jsonl, for people to read."""
    logging: LoggingConfig = LoggingConfig()
    """Logging."""
    tracing: TracingConfig = TracingConfig()
    """Tracing."""

    @property
    def group_size(self) -> int:
        """Rollouts of each prompt."""
        return self.rollouts_per_prompt or self.algorithm.default_rollouts

    @property
    def limits(self) -> Limits:
        """All limits of the run."""
        return Limits(self.num_steps, self.budget.tokens, self.budget.wall_s)

    @model_validator(mode="after")
    def _check_algorithm(self) -> Self:
        algorithm = self.algorithm
        if problem := algorithm.problem(self.group_size, self.prompts_per_step):
            raise ValueError(problem)
        if self.group_size < algorithm.min_rollouts:
            raise ValueError(
                f"rollouts_per_prompt: is {self.group_size}; algorithm {algorithm.kind} needs at least "
                f"{algorithm.min_rollouts}"
            )
        return self
