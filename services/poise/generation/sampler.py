"""From prompts to finished groups, or to their own states: limits, seeds, and the order of finishing.

Owns how many rollouts run and wait. Knows engines by their interface and no transport.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np

from poise.errors import Busy, InvalidRequest
from poise.generation.config import GenerationConfig
from poise.generation.engine import Engine, EngineRequest, EngineRollout
from poise.generation.prompts.time_limit import LimitReached, TimeLimit
from poise.runtime.rpc.validation import Violations
from poise_client.types import (
    EncodedPrompt,
    Group,
    Message,
    Prompt,
    PromptCheck,
    PromptContent,
    Rollout,
    RolloutId,
    Sampling,
)

P = TypeVar("P")
T = TypeVar("T")

MAX_CHARS_PER_TOKEN = 64
"""Longer texts, relative to max_model_len, are rejected before they are tokenised."""

_PROMPT_S, _REQUEST_S = 5.0, 60.0
"""How long a prompt's chat template may take, and all prompts of a request."""
_TEMPLATE_CHARS = 2**18
"""What a chat template may add to a conversation, such as a description of tools."""
_NUM_THREADS = 2
_FEW_PROMPTS, _FEW_CHARS = 64, 2**14
"""Up to here, tokenising on the event loop is faster than using a thread."""

MAX_PROBLEM_CHARS = 200
"""Characters kept of a prompt's problem, so that 4096 of them fit one answer."""


@dataclass(frozen=True, slots=True)
class _Job:
    """One group to sample."""

    group_id: str
    prompt_token_ids: list[int]
    sampling: Sampling


class Sampler:
    """Runs at most `max_num_seqs` rollouts at a time; refuses beyond `max_queued_rollouts`."""

    def __init__(self, engine: Engine, config: GenerationConfig) -> None:
        self._engine = engine
        self._config = config
        self._slots = asyncio.Semaphore(config.max_num_seqs)
        self._threads = ThreadPoolExecutor(max_workers=_NUM_THREADS, thread_name_prefix="tokenize")
        self._request_ids = itertools.count()
        self.num_accepted = 0
        """Rollouts accepted, of groups not yet handed over, and prompts to be encoded."""
        self._idle = asyncio.Event()
        self._idle.set()
        self.num_running = 0
        """Rollouts and prompts in the engine."""
        self._stirred_s = time.monotonic()

    @property
    def quiet_s(self) -> float:
        """How long nothing went into the engine or came out of it, though something is in it; 0 where nothing is."""
        return time.monotonic() - self._stirred_s if self.num_running else 0.0

    def sample(
        self,
        run_id: str,
        step: int,
        prompts: Sequence[Prompt],
        num_rollouts: int,
        sampling: Sampling,
        return_token_entropies: bool,
    ) -> AsyncGenerator[Group, None]:
        """Yield each group as its last rollout finishes. Closing the iterator aborts what still runs.

        Raises:
            InvalidRequest: a prompt that cannot be, takes too long to tokenise, or leaves no room for a response.
            Busy: too many rollouts wait already.
        """
        return self._run(
            prompts,
            sampling,
            num_rollouts,
            lambda job: self._sample_group(run_id, step, job, num_rollouts, return_token_entropies),
        )

    def encode(self, prompts: Sequence[Prompt]) -> AsyncGenerator[EncodedPrompt, None]:
        """Yield each prompt's state as it is there, under the limits of as many rollouts. Otherwise as `sample`."""
        return self._run(prompts, Sampling(max_tokens=1), 1, self._encode)

    async def check(self, prompts: Sequence[Prompt]) -> list[PromptCheck]:
        """Return each prompt's number of tokens, however large, or why it cannot be sampled."""
        return [await self._on_thread(self._check, prompt, self._limit()) for prompt in prompts]

    def _check(self, prompt: Prompt, limit: TimeLimit) -> PromptCheck:
        try:
            return PromptCheck(prompt.group_id, len(self._token_ids(prompt.content, limit)), "")
        except InvalidRequest as error:
            return PromptCheck(prompt.group_id, 0, error.message[:MAX_PROBLEM_CHARS])

    async def _run(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        num_rollouts: int,
        work: Callable[[_Job], Coroutine[Any, Any, T]],
    ) -> AsyncGenerator[T, None]:
        num_new = len(prompts) * num_rollouts
        limit = self._config.max_queued_rollouts
        if num_new > limit:
            raise InvalidRequest.field("prompts", f"ask for {num_new} rollouts; max_queued_rollouts is {limit}")
        if self.num_accepted + num_new > limit:
            raise Busy(f"{self.num_accepted} rollouts are waiting, of at most {limit}", retry_after_s=1.0)
        self.num_accepted += num_new
        self._idle.clear()
        tasks: list[asyncio.Task[T]] = []
        num_left = num_new
        try:
            tasks += [asyncio.create_task(work(job)) for job in await self._jobs(prompts, sampling)]
            for task in asyncio.as_completed(tasks):
                yield await task
                num_left -= num_rollouts
                self._release(num_rollouts)
        finally:
            try:
                await _cancel(tasks)
            finally:  # cancelled once more, they are given up all the same
                self._release(num_left)

    def _release(self, num_rollouts: int) -> None:
        self.num_accepted -= num_rollouts
        if self.num_accepted == 0:
            self._idle.set()

    def close(self) -> None:
        """Tokenise no further prompts."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def idle(self) -> None:
        """Return once nothing accepted is left."""
        await self._idle.wait()

    async def _jobs(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[_Job]:
        """Tokenise on a thread, unless there is little to do."""
        limit = self._limit()
        if _are_few(prompts):
            return self._tokenised(prompts, limit, sampling)
        return await self._on_thread(functools.partial(self._tokenised, sampling=sampling), prompts, limit)

    async def _on_thread(self, work: Callable[[P, TimeLimit], T], of: P, limit: TimeLimit) -> T:
        """Run work on a tokenizing thread; end it when the caller is cancelled."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, of, limit)
        except asyncio.CancelledError:
            limit.cancel()
            raise

    def _tokenised(self, prompts: Sequence[Prompt], limit: TimeLimit, sampling: Sampling) -> list[_Job]:
        jobs, wrong = [], Violations()
        for index, prompt in enumerate(prompts):
            if wrong.is_full:
                break
            try:
                token_ids = self._token_ids(prompt.content, limit)
                resolved = dataclasses.replace(sampling, max_tokens=self._max_tokens(len(token_ids), sampling))
                jobs.append(_Job(prompt.group_id, token_ids, resolved))
            except InvalidRequest as error:
                for violation in error.violations:
                    wrong.add(f"prompts[{index}].{violation.field}", violation.description)
        wrong.raise_if_any()
        return jobs

    def _token_ids(self, content: PromptContent, limit: TimeLimit) -> list[int]:
        if not isinstance(content, str) and content and isinstance(content[0], int):
            return self._checked_ids(cast(Sequence[int], content))
        text = cast(str | Sequence[Message], content)
        kind = "text" if isinstance(text, str) else "chat"
        num_chars, max_chars = _num_chars(text), self._max_chars
        if num_chars > max_chars:
            raise InvalidRequest.field(
                kind,
                f"has {num_chars} characters; max_model_len is {self._engine.info.max_model_len} tokens, and more than "
                f"{max_chars} characters are not tokenised",
            )
        try:
            limit.check()
            token_ids = self._engine.tokenize(text, limit)
        except LimitReached as error:
            raise InvalidRequest.field(kind, f"tokenising it was ended: {error}") from error
        if not token_ids:
            raise InvalidRequest.field(kind, "has no tokens; a prompt needs at least one")
        check_vocabulary(kind, token_ids, self._engine.info.vocabulary_size)
        return token_ids

    @property
    def _max_chars(self) -> int:
        return MAX_CHARS_PER_TOKEN * self._engine.info.max_model_len

    def _limit(self) -> TimeLimit:
        return TimeLimit(_REQUEST_S, each_s=_PROMPT_S, max_chars=self._max_chars + _TEMPLATE_CHARS)

    def _checked_ids(self, token_ids: Sequence[int]) -> list[int]:
        self._room(len(token_ids))  # first, as it needs only their number
        check_vocabulary("tokens.token_ids", token_ids, self._engine.info.vocabulary_size)
        return list(token_ids)

    def _max_tokens(self, num_prompt_tokens: int, sampling: Sampling) -> int:
        return min(sampling.max_tokens or self._config.default_max_tokens, self._room(num_prompt_tokens))

    def _room(self, num_prompt_tokens: int) -> int:
        """Return how many response tokens there is room for. Raises `InvalidRequest` when it is none."""
        room = self._engine.info.max_model_len - num_prompt_tokens
        if room < 1:
            raise InvalidRequest.field(
                "prompt",
                f"has {num_prompt_tokens} tokens; max_model_len is {self._engine.info.max_model_len}, and a response "
                "needs at least one",
            )
        return room

    async def _sample_group(
        self, run_id: str, step: int, job: _Job, num_rollouts: int, return_token_entropies: bool
    ) -> Group:
        siblings = [asyncio.create_task(self._sample_rollout(job, index)) for index in range(num_rollouts)]
        try:
            finished = await asyncio.gather(*siblings)
        finally:
            await _cancel(siblings)
        rollouts = [
            _rollout(RolloutId(run_id, step, job.group_id, index), done, return_token_entropies)
            for index, done in enumerate(finished)
        ]
        return Group(job.group_id, np.array(job.prompt_token_ids, np.int32), tuple(rollouts))

    async def _sample_rollout(self, job: _Job, index: int) -> EngineRollout:
        sampling = job.sampling
        if sampling.seed is not None:
            sampling = dataclasses.replace(sampling, seed=rollout_seed(sampling.seed, job.group_id, index))
        async with self._slot():
            request = EngineRequest(f"rollout-{next(self._request_ids)}", job.prompt_token_ids, sampling)
            return await self._engine.generate(request)

    async def _encode(self, job: _Job) -> EncodedPrompt:
        async with self._slot():
            done = await self._engine.encode(job.prompt_token_ids)
        return EncodedPrompt(job.group_id, len(job.prompt_token_ids), done.prompt_hidden, done.policy_version)

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        async with self._slots:
            self.num_running += 1
            self._stirred_s = time.monotonic()
            try:
                yield
            finally:
                self.num_running -= 1
                self._stirred_s = time.monotonic()


def check_vocabulary(field: str, token_ids: Sequence[int], vocabulary_size: int) -> None:
    """Raise `InvalidRequest` for a token that the model has no embedding for."""
    beyond = next((token for token in token_ids if not 0 <= token < vocabulary_size), None)
    if beyond is not None:
        raise InvalidRequest.field(field, f"has token {beyond}; the model's vocabulary is 0 to {vocabulary_size - 1}")


def _num_chars(content: str | Sequence[Message]) -> int:
    if isinstance(content, str):
        return len(content)
    return sum(len(turn["content"]) + len(turn["role"]) for turn in content)


def _are_few(prompts: Sequence[Prompt]) -> bool:
    """Whether prompts are tokenised at once. Conversations are not: their template is a program."""
    num_chars = 0
    for prompt in prompts:
        if not prompt.content or isinstance(prompt.content[0], dict):
            return False
        num_chars += len(prompt.content)
    return len(prompts) <= _FEW_PROMPTS and num_chars <= _FEW_CHARS


def rollout_seed(seed: int, group_id: str, rollout_index: int) -> int:
    """Return the seed of one rollout, below 2^63: independent of the order in which rollouts run."""
    digest = hashlib.sha256(f"{seed}/{rollout_index}/{group_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _rollout(rollout_id: RolloutId, done: EngineRollout, return_token_entropies: bool) -> Rollout:
    return Rollout(
        id=rollout_id,
        token_ids=done.token_ids,
        logprobs=done.logprobs,
        features=done.features,
        version_spans=done.version_spans,
        finish_reason=done.finish_reason,
        text=done.text,
        token_entropies=done.token_entropies if return_token_entropies else None,
        first_token_s=done.first_token_s,
        total_s=done.total_s,
    )
