"""The settings of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

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
"""The generation service samples at no temperature between 0 and this."""


class EndpointsConfig(StrictModel):
    """Where the services are."""

    generation: tuple[str, ...] = Field(("127.0.0.1:50051",), min_length=1)
    """Generation replicas: `host:port`, or `dns:///name:port` for all addresses that a name has, looked up again and
    again: replicas may come and go while a run is driven. Prompts go to whichever has the fewest tokens to do."""
    rollouts_per_replica: int = Field(256, ge=1)
    """Rollouts that a replica is given at a time. More than it samples at once keep it busy; those beyond wait for the
    replica that is free first."""
    value: str = "127.0.0.1:50052"
    """Value service, `host:port`."""
    learner: str = "127.0.0.1:50053"
    """Learner service, `host:port`."""
    token_file: Path | None = None
    """File holding the bearer token of the services."""
    ca_file: Path | None = None
    """PEM of the authorities that sign the services' certificates; set it to speak TLS."""
    use_proxy: bool = False
    """Reach the services through the proxy that `http_proxy` and the like name; by default they are ignored."""

    @field_validator("generation", "value", "learner")
    @classmethod
    def _services_can_be_found(cls, targets: tuple[str, ...] | str) -> tuple[str, ...] | str:
        for target in (targets,) if isinstance(targets, str) else targets:
            parse_name(target)
        return targets


class SamplingConfig(StrictModel):
    """How rollouts are sampled for training."""

    temperature: float = Field(1.0, ge=MIN_TEMPERATURE, le=100)
    """Of sampling, and of the loss."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus mass. Below 1 the loss no longer matches the sampling exactly."""
    max_tokens: int = Field(256, ge=1)
    """Most response tokens."""
    stop: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = Field((), max_length=16)
    """Strings that end a response, at most 16. They may name special tokens, such as `<|im_end|>`."""
    stop_token_ids: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field((), max_length=16)
    """Ids of tokens that end a response, besides the model's own; at most 16."""


class EvaluationConfig(StrictModel):
    """Measuring the policy on prompts it never trains on."""

    num_prompts: int = Field(128, ge=0)
    """Held-out prompts; 0 evaluates nothing."""
    rollouts_per_prompt: int = Field(4, ge=1, le=256)
    """Responses to each. pass@k is told for k = 1, 2, 4, … up to it."""
    temperature: float = Field(1.0, ge=0, le=100)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus mass."""
    pass_threshold: float = Field(1.0, gt=0, le=1)
    """Reward from which on a response counts as passed, for pass@k."""
    every_steps: int = Field(0, ge=0)
    """Evaluate after every so many steps, too; 0 means before and after training alone."""
    every_tokens: int = Field(0, ge=0)
    """Evaluate each time the response tokens sampled for training pass another multiple of this, too; 0 is off. Curves
    of different algorithms are then measured at the same points."""
    every_wall_s: float = Field(0.0, ge=0)
    """Evaluate each time the seconds of training pass another multiple of this, too; 0 is off."""

    @field_validator("temperature")
    @classmethod
    def _temperature_can_be_sampled_at(cls, temperature: float) -> float:
        if 0 < temperature < MIN_TEMPERATURE:
            raise ValueError(f"is {temperature:g}; required: 0 (greedy), or {MIN_TEMPERATURE:g} to 100")
        return temperature


class BudgetConfig(StrictModel):
    """What the whole run may spend. It ends after the step that reaches this, or `num_steps`."""

    tokens: int | None = Field(None, ge=1)
    """Response tokens sampled for training, those of groups that an algorithm drops among them; null is no limit."""
    wall_s: float | None = Field(None, gt=0)
    """Seconds of training, over all restarts and without evaluations; null is no limit."""


class OrchestratorConfig(Settings):
    """A training run."""

    model_config = SettingsConfigDict(env_prefix="POISE_TRAIN_")

    run_id: str = Field("run", pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")
    """Names the run in every rollout id. A new run needs a new name; the same name resumes."""
    run_dir: Path
    """Folder of the run: metrics, samples, journal, report."""
    seed: int = Field(0, ge=0, lt=2**31)
    """The prompts of a step, and the seeds of its rollouts, follow from it and the step alone."""
    num_steps: int = Field(500, ge=1)
    """Steps of the whole run."""
    budget: BudgetConfig = BudgetConfig()
    """Other limits of the whole run."""
    prompts_per_step: int = Field(256, ge=1, le=4096)
    """Prompts a step samples."""
    rollouts_per_prompt: int | None = Field(None, ge=1, le=256)
    """Rollouts of each prompt, the group; null takes what the algorithm is used with: 2 for `poise`, 1 for `spo` and
    `ppo`, 8 for the others."""
    algorithm: AlgorithmConfig = PoiseOptions()
    """How advantages are computed: a name, or `kind` and its options. See docs/reference/algorithms.md."""
    max_staleness: int = Field(0, ge=0, le=64)
    """Steps that may be sampled ahead of the learner, and so the versions that their rollouts may be behind it when it
    trains on them; 0 is exactly on-policy, each side waiting for the other. At most the learner's own max_staleness."""
    max_untrained_steps: int = Field(5, ge=1)
    """Steps in a row that may train nothing: the learner rejects every rollout, no update is finite, no response can be
    verified, or the algorithm filters out every group. Then the run stops with the reason and status 1. A run none of
    whose steps trained anything ends so too."""
    max_mismatch_kl: float | None = Field(0.05, gt=0)
    """Largest KL divergence of engine and learner in the first step, nats a token: the mean of exp(d) − 1 − d for d the
    learner's log-probability less the engine's. Beyond it they compute different models, and the run stops. Rounding
    costs about 1e-9 in float32, and 0.001 to 0.01 with an engine in bfloat16. Null never stops."""
    settle_probe_s: float = Field(30.0, ge=0, le=600)
    """Before a step is valued, wait at most so long until the probe is fitted on all labels of the steps before, which
    takes no time as a rule: they were published before the learner trained. A run can then be repeated, over restarts
    too (docs/how_to/resume_exactly.md). Only where `max_staleness` is 0; 0 never waits."""
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    """What is trained on; a mixture by weight."""
    on_bad_row: OnBadRow = "stop"
    """What rows of data files do that cannot be used (wrong JSON, longer than the model takes, refused by its chat
    template): `stop` names them before the first step, `skip` leaves them out and says how many there are."""
    sampling: SamplingConfig = SamplingConfig()
    """How rollouts are sampled."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out measurements."""
    verifier: VerifierConfig = VerifierConfig()
    """Where and for how long answers are checked."""
    endpoints: EndpointsConfig = EndpointsConfig()
    """Where the services are."""
    samples_per_step: int = Field(4, ge=0)
    """Groups a step writes to trajectories.jsonl, for people to read."""
    logging: LoggingConfig = LoggingConfig()
    """What is logged."""
    tracing: TracingConfig = TracingConfig()
    """What is traced."""

    @property
    def group_size(self) -> int:
        """Rollouts of each prompt."""
        return self.rollouts_per_prompt or self.algorithm.usual_rollouts

    @property
    def limits(self) -> Limits:
        """What the run may spend."""
        return Limits(self.num_steps, self.budget.tokens, self.budget.wall_s)

    @model_validator(mode="after")
    def _algorithm_has_what_it_needs(self) -> Self:
        algorithm = self.algorithm
        if self.group_size < algorithm.min_rollouts:
            raise ValueError(
                f"rollouts_per_prompt: is {self.group_size}; algorithm {algorithm.kind} needs {algorithm.min_rollouts}"
            )
        if isinstance(algorithm, PoiseOptions) and algorithm.bootstrap == "batch_mean" and self.prompts_per_step < 2:
            raise ValueError("algorithm.bootstrap: batch_mean needs prompts_per_step of at least 2")
        return self
