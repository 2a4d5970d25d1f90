"""`poise models check`: compare engine, learner and adapters with a model's own forward pass, and print the result."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from poise.errors import BackendDown
from poise.generation.app import make_engine
from poise.generation.config import GenerationConfig
from poise.generation.engine import Engine, EngineRequest
from poise.learner.config import LearnerConfig
from poise.local.models.catalog import find_model
from poise.local.run_file import LocalRun
from poise.runtime.config.settings import ConfigError
from poise_client.types import Rollout, RolloutId, Sampling

if TYPE_CHECKING:
    from poise.learner.models.comparison import Comparison, EngineSample

OK, FAILED = 0, 1

_PROMPTS = ("1", "7 + 8 =", "One, two, three, four, five: the next number after these is")
_NUM_SIBLINGS, _NUM_TOKENS = 2, 24


def check_model(name: str | None, run: LocalRun | None, engine: str | None, as_json: bool) -> int:
    """Compare, print the result, and return the exit status: 1 for a model that cannot be trained.

    Args:
        name: a known model, a folder or a name on the hub; None uses the run's.
        run: the run whose settings of generation and learner apply; None uses the defaults.
        engine: engine to check besides `torch`; None uses the run's.
        as_json: print one JSON object.

    Raises:
        ConfigError: the model does not exist, or none is named.
    """
    if name is None and run is None:
        raise ConfigError("name a model (a Hugging Face folder, a name of `poise models`, or org/name), or set -c FILE")
    model = str(find_model(run.model if name is None and run is not None else str(name), "FOLDER"))
    with tempfile.TemporaryDirectory(prefix="poise-models-") as scratch, _stdout_to_stderr():
        generation, learner = _settings(model, run, Path(scratch))
        engines = dict.fromkeys(["torch", engine or (generation.engine if run is not None else "torch")])
        facts = _check(model, learner, [generation.model_copy(update={"engine": each}) for each in engines])
    click.echo(json.dumps(facts) if as_json else _table(facts))
    return OK if facts["trainable"] else FAILED


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirect the output of engines and their processes, so that standard output has only the result."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def _settings(model: str, run: LocalRun | None, scratch: Path) -> tuple[GenerationConfig, LearnerConfig]:
    if run is None:
        return GenerationConfig(model=model, engine="torch"), LearnerConfig(model=model, state_dir=scratch)
    own = {"model": model, "wait_for_learner": False, "lora": None, "nccl": False}
    learner = run.learner.model_copy(update={"model": model, "state_dir": scratch})
    return run.generation.model_copy(update=own), learner


def _check(model: str, learner: LearnerConfig, engines: Sequence[GenerationConfig]) -> dict[str, Any]:
    from poise.learner.models.comparison import checkpoint_dtype, compare

    try:
        dtype = engines[0].dtype if engines[0].dtype != "auto" else checkpoint_dtype(model)
        samples = [asyncio.run(_sample(config)) for config in engines]
        compared = compare(learner, samples, dtype)
    except BackendDown as error:
        return {"model": model, "trainable": False, "problem": str(error), "parts": []}
    return {
        "model": model,
        "trainable": all(part.is_within_limits for part in compared if part.is_needed),
        "problem": next((_problem(part) for part in compared if part.is_needed and not part.is_within_limits), ""),
        "parts": [_facts(part) for part in compared],
    }


async def _sample(config: GenerationConfig) -> EngineSample:
    from poise.learner.models.comparison import EngineSample

    try:
        engine = make_engine(config)
        try:
            await engine.start()
            return EngineSample(config.engine, await _rollouts(engine))
        finally:
            await engine.stop()
    except BackendDown as error:
        return EngineSample(config.engine, failure=f"{error}. {error.remedy}" if error.remedy else str(error))
    except Exception as error:  # engines raise any exception for models that they do not support
        return EngineSample(config.engine, failure=f"{type(error).__name__}: {error}")


async def _rollouts(engine: Engine) -> list[Rollout]:
    rollouts = []
    for group, text in enumerate(_PROMPTS):
        ids = engine.tokenize(text)[: engine.info.max_model_len // 2]
        if not ids:
            raise BackendDown(f"the tokenizer returns no token for {text!r}")
        if max(ids) >= engine.info.vocabulary_size:
            raise BackendDown(
                f"the tokenizer returns id {max(ids)}, but the model embeds {engine.info.vocabulary_size} ids"
            )
        for index in range(_NUM_SIBLINGS):
            sampling = Sampling(max_tokens=min(_NUM_TOKENS, engine.info.max_model_len - len(ids)), seed=index)
            rollout_id = RolloutId("check", 0, str(group), index)
            sampled = await engine.generate(EngineRequest(rollout_id, ids, sampling))
            rollouts.append(
                Rollout(
                    id=rollout_id,
                    prompt_token_ids=np.array(ids, np.int32),
                    token_ids=sampled.token_ids,
                    logprobs=sampled.logprobs,
                    advantage=0.0,
                    version_spans=sampled.version_spans,
                )
            )
    return rollouts


def _facts(part: Comparison) -> dict[str, Any]:
    difference = part.difference
    largest, mean = part.allowed_nats
    return {
        "part": part.part,
        "dtype": part.dtype,
        "ok": part.is_within_limits,
        "needed": part.is_needed,
        "largest_nats": None if difference is None else _finite(difference.largest),
        "mean_nats": None if difference is None else _finite(difference.mean),
        "allowed_largest_nats": largest,
        "allowed_mean_nats": mean,
        "detail": part.detail,
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _problem(part: Comparison) -> str:
    if part.difference is None:
        return f"{part.part}: {part.detail}"
    largest, mean = part.allowed_nats
    allowed = f"mean {mean:g}" if largest is None else f"{largest:g}, mean {mean:g}"
    return f"{part.part}: log-probabilities {part.difference}; allowed: {allowed}"


def _table(facts: dict[str, Any]) -> str:
    lines = [f"model {facts['model']}: difference from its own float32 forward pass, in nats per token"]
    if facts["parts"]:
        lines.append(f"  {'':14} {'dtype':9} {'largest':>10} {'mean':>10}")
    for part in facts["parts"]:
        result = "ok" if part["ok"] else "WRONG" if part["needed"] else "unusable (needed only for `lora`)"
        numbers = ("-" if part[name] is None else f"{part[name]:.2g}" for name in ("largest_nats", "mean_nats"))
        detail = f"; {part['detail']}" if part["detail"] else ""
        lines.append(f"  {part['part']:14} {part['dtype']:9} {' '.join(f'{n:>10}' for n in numbers)}  {result}{detail}")
    lines.append(
        "the model can be trained" if facts["trainable"] else f"the model cannot be trained: {facts['problem']}"
    )
    return "\n".join(lines)
