"""Checks all prompts of the data files before the first step, and reports invalid ones by file and line.

The generation service tokenizes them, because it has the model's tokenizer, chat template and length limit. Token
counts are cached by the content of the prompts, the tokenizer and the vocabulary size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.sampling.service_clients import ServiceClients
from poise.orchestrator.tasks.mixture import Mixture
from poise.orchestrator.tasks.problem import Problem, TaskError
from poise.orchestrator.tasks.rows import DataFile
from poise.runtime.config.settings import ConfigError
from poise.runtime.files.atomic import write_file
from poise.runtime.files.cache import cache_dir
from poise_client.types import Policy

logger = logging.getLogger(__name__)

MAX_CACHED = 64
"""Files with cached counts."""
LOG_EVERY_S = 5.0

Count = tuple[int, str]
"""Number of tokens of a prompt, and why generation rejects it regardless of its length; empty if it does not."""


async def check_data(
    config: OrchestratorConfig, mixture: Mixture, services: ServiceClients, log: Callable[[str], None]
) -> None:
    """Check all prompts of the data files. Drop invalid rows from the mixture, or fail, depending on `on_bad_row`.

    Raises:
        ConfigError: a stop token is not in the model's vocabulary.
        TaskError: rows are invalid and `on_bad_row` is `stop`, or too few are left.
    """
    if not mixture.files and not config.sampling.stop_token_ids:
        return
    policy = await services.generation_policy()
    _check_stop_tokens(config, policy)
    checked: list[DataFile] = []
    wrong: list[str] = []
    for file in mixture.files:
        counts = await _counts(file, policy, services, log)
        bad = _bad_rows(file.problems, counts, config.sampling.max_tokens, policy.max_model_len)
        checked.append(file.without(bad))
        try:
            checked[-1].raise_if_bad()
        except TaskError as error:
            wrong.append(str(error))
    if wrong:
        raise TaskError("\n".join(wrong))
    for line in (line for file in checked for line in file.describe_skipped()):
        logger.warning("%s", line)
    mixture.replace_files(checked)
    mixture.held_out(config.evaluation.num_prompts)  # raises if too few are left


def _check_stop_tokens(config: OrchestratorConfig, policy: Policy) -> None:
    beyond = [token for token in config.sampling.stop_token_ids if token >= policy.vocabulary_size]
    if beyond:
        raise ConfigError(
            f"sampling.stop_token_ids: contains {beyond[0]}; the model's ids are 0 to {policy.vocabulary_size - 1}"
        )


def _bad_rows(
    problems: Sequence[Problem], counts: Sequence[Count], max_tokens: int, max_model_len: int
) -> list[tuple[Problem, str]]:
    """Return the invalid rows with the reasons.

    If `max_tokens` is at least `max_model_len`, a prompt needs room for only one response token.
    """
    room = max_tokens if max_tokens < max_model_len else 1
    bad = []
    for problem, (num_tokens, what) in zip(problems, counts, strict=True):
        if not what and num_tokens + room > max_model_len:
            what = (
                f"prompt: has {num_tokens} tokens; {num_tokens} + {room} response tokens exceed max_model_len = "
                f"{max_model_len}. Shorten it, lower sampling.max_tokens, or raise the generation service's "
                "max_model_len"
            )
        if what:
            bad.append((problem, what))
    return bad


async def _counts(file: DataFile, policy: Policy, services: ServiceClients, log: Callable[[str], None]) -> list[Count]:
    """Return the count of each prompt of a file, from the cache or from generation."""
    path = _cache_path(file, policy)
    if path is not None and (cached := _read_cache(path, len(file.problems))) is not None:
        return cached
    total, started_s = len(file.problems), time.monotonic()
    logged_s = started_s

    def log_progress(num_checked: int) -> None:
        nonlocal logged_s
        now_s = time.monotonic()
        if now_s - logged_s >= LOG_EVERY_S:
            logged_s = now_s
            log(f"{file.path}: {num_checked} of {total} prompts checked")

    prompts = [problem.prompt if isinstance(problem.prompt, str) else list(problem.prompt) for problem in file.problems]
    checks = await services.check_prompts(prompts, log_progress)
    if logged_s > started_s:
        log(f"{file.path}: {total} prompts checked in {time.monotonic() - started_s:.0f} s")
    counts = [(check.num_tokens, check.problem) for check in checks]
    if path is not None:
        _write_cache(path, counts)
    return counts


def _cache_path(file: DataFile, policy: Policy) -> Path | None:
    """Return the path of the cached counts; None if the tokenizer has no digest."""
    if not policy.tokenizer_digest:
        return None
    digest = hashlib.sha256(f"{policy.tokenizer_digest.hex()}/{policy.vocabulary_size}".encode())
    for problem in file.problems:
        digest.update(problem.prompt_key.encode())
    try:
        return cache_dir() / "prompts" / f"{digest.hexdigest()}.json"
    except RuntimeError:  # a user without a home
        return None


def _read_cache(path: Path, num: int) -> list[Count] | None:
    try:
        counts = [(int(num_tokens), str(what)) for num_tokens, what in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError):
        return None
    with contextlib.suppress(OSError):
        path.touch()  # the least recently used are deleted
    return counts if len(counts) == num else None


def _write_cache(path: Path, counts: Sequence[Count]) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(path, json.dumps(counts).encode())
        kept = sorted(path.parent.glob("*.json"), key=lambda each: each.stat().st_mtime)
        for old in kept[:-MAX_CACHED]:
            old.unlink()
    except OSError as error:
        logger.debug("cannot cache token counts: %s", error)
