"""Tokenizes prompts, then samples groups of rollouts or encodes prompts. Enforces limits and derives seeds."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np

from poise.errors import Busy, InvalidRequest
from poise.generation.config import GenerationConfig
from poise.generation.engine import Engine, EngineRequest
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
"""Texts with more characters than this times max_model_len are rejected before they are tokenized."""

_PROMPT_S, _REQUEST_S = 5.0, 60.0
"""Maximum time for the chat template of one prompt, and for all prompts of a request."""
_TEMPLATE_CHARS = 2**18
"""Maximum characters that a chat template may add to a conversation, such as tool descriptions."""
_NUM_THREADS = 2
_MAX_INLINE_PROMPTS, _MAX_INLINE_CHARS = 64, 2**14
"""Up to this size, tokenizing on the event loop is faster than on a thread."""

MAX_PROBLEM_CHARS = 200
"""Problem texts are cut at this length, so that those of 4096 prompts fit in one response."""


@dataclass(frozen=True, slots=True)
class _TokenizedPrompt:
    """One prompt with its token ids and its resolved sampling parameters."""

    group_id: str
    token_ids: list[int]
    sampling: Sampling


class Sampler:
    """Runs at most `max_num_seqs` rollouts at once, and rejects requests beyond `max_queued_rollouts`."""

    def __init__(self, engine: Engine, config: GenerationConfig) -> None:
        self._engine = engine
        self._config = config
        self._slots = asyncio.Semaphore(config.max_num_seqs)
        self._threads = ThreadPoolExecutor(max_workers=_NUM_THREADS, thread_name_prefix="tokenize")
        self._idle = asyncio.Event()
        self._idle.set()
        self._last_activity_s = time.monotonic()
        self.num_accepted = 0
        """Accepted rollouts whose group was not yielded yet, plus prompts that are not encoded yet."""
        self.num_running = 0
        """Rollouts and prompts in the engine."""

    @property
    def stalled_s(self) -> float:
        """Seconds since anything entered or left the engine; 0 while it is empty."""
        return time.monotonic() - self._last_activity_s if self.num_running else 0.0

    def sample(
        self, run_id: str, step: int, prompts: Sequence[Prompt], num_rollouts: int, sampling: Sampling
    ) -> AsyncGenerator[Group, None]:
        """Yield each group when its last rollout finishes. Closing the iterator aborts the others.

        Raises:
            InvalidRequest: a prompt is malformed, too long, or takes too long to tokenize.
            Busy: too many rollouts are waiting.
        """
        return self._run(
            prompts,
            sampling,
            num_rollouts,
            lambda prompt: self._sample_group(run_id, step, prompt, num_rollouts),
        )

    def encode(self, prompts: Sequence[Prompt]) -> AsyncGenerator[EncodedPrompt, None]:
        """Yield each encoded prompt when it finishes.

        Each prompt counts as one rollout toward the limits. Cancellation and errors are those of `sample`.
        """
        return self._run(prompts, Sampling(max_tokens=1), 1, self._encode)

    async def check(self, prompts: Sequence[Prompt]) -> list[PromptCheck]:
        """Return each prompt's number of tokens, even above max_model_len, or why it cannot be sampled."""
        return [await self._on_thread(self._check, prompt, self._limit()) for prompt in prompts]

    async def wait_until_idle(self) -> None:
        """Wait until no accepted rollout is left."""
        await self._idle.wait()

    def close(self) -> None:
        """Stop the tokenizing threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        num_rollouts: int,
        work: Callable[[_TokenizedPrompt], Coroutine[Any, Any, T]],
    ) -> AsyncGenerator[T, None]:
        num_new = len(prompts) * num_rollouts
        limit = self._config.max_queued_rollouts
        if num_new > limit:
            raise InvalidRequest.field(
                "prompts",
                f"need {num_new} rollouts; max_queued_rollouts is {limit}",
                remedy="Send fewer prompts or rollouts per request, or raise max_queued_rollouts.",
            )
        if self.num_accepted + num_new > limit:
            raise Busy(
                f"{self.num_accepted} rollouts are waiting and {num_new} more exceed max_queued_rollouts, {limit}",
                retry_after_s=1.0,
            )
        self.num_accepted += num_new
        self._idle.clear()
        tasks: list[asyncio.Task[T]] = []
        num_left = num_new
        try:
            tasks += [asyncio.create_task(work(prompt)) for prompt in await self._tokenize_all(prompts, sampling)]
            for task in asyncio.as_completed(tasks):
                yield await task
                num_left -= num_rollouts
                self._release(num_rollouts)
        finally:
            try:
                await _cancel(tasks)
            finally:  # even if this task is cancelled a second time
                self._release(num_left)

    def _release(self, num_rollouts: int) -> None:
        self.num_accepted -= num_rollouts
        if self.num_accepted == 0:
            self._idle.set()

    async def _sample_group(self, run_id: str, step: int, prompt: _TokenizedPrompt, num_rollouts: int) -> Group:
        rollout_ids = [RolloutId(run_id, step, prompt.group_id, index) for index in range(num_rollouts)]
        siblings = [asyncio.create_task(self._sample_rollout(prompt, rollout_id)) for rollout_id in rollout_ids]
        try:
            rollouts = await asyncio.gather(*siblings)
        finally:
            await _cancel(siblings)
        ids = np.array(prompt.token_ids, np.int32)
        return Group(prompt.group_id, tuple(dataclasses.replace(rollout, prompt_token_ids=ids) for rollout in rollouts))

    async def _sample_rollout(self, prompt: _TokenizedPrompt, rollout_id: RolloutId) -> Rollout:
        sampling = prompt.sampling
        if sampling.seed is not None:
            seed = rollout_seed(sampling.seed, prompt.group_id, rollout_id.rollout_index)
            sampling = dataclasses.replace(sampling, seed=seed)
        async with self._slot():
            return await self._engine.generate(EngineRequest(rollout_id, prompt.token_ids, sampling))

    async def _encode(self, prompt: _TokenizedPrompt) -> EncodedPrompt:
        async with self._slot():
            return await self._engine.encode(prompt.group_id, prompt.token_ids)

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        async with self._slots:
            self.num_running += 1
            self._last_activity_s = time.monotonic()
            try:
                yield
            finally:
                self.num_running -= 1
                self._last_activity_s = time.monotonic()

    def _check(self, prompt: Prompt, limit: TimeLimit) -> PromptCheck:
        try:
            return PromptCheck(prompt.group_id, len(self._token_ids(prompt.content, limit)), "")
        except InvalidRequest as error:
            return PromptCheck(prompt.group_id, 0, error.message[:MAX_PROBLEM_CHARS])

    async def _tokenize_all(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[_TokenizedPrompt]:
        """Tokenize on the event loop if the prompts are short, else on a thread."""
        limit = self._limit()
        if _are_short(prompts):
            return self._tokenize(prompts, limit, sampling)
        return await self._on_thread(functools.partial(self._tokenize, sampling=sampling), prompts, limit)

    async def _on_thread(self, work: Callable[[P, TimeLimit], T], argument: P, limit: TimeLimit) -> T:
        """Run work on a tokenizing thread. Cancelling the caller ends it at its next check of `limit`."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, argument, limit)
        except asyncio.CancelledError:
            limit.cancel()
            raise

    def _tokenize(self, prompts: Sequence[Prompt], limit: TimeLimit, sampling: Sampling) -> list[_TokenizedPrompt]:
        tokenized, wrong = [], Violations()
        for index, prompt in enumerate(prompts):
            if wrong.is_full:
                break
            try:
                token_ids = self._token_ids(prompt.content, limit)
                max_response = self._max_response_tokens(len(token_ids))
                max_tokens = min(sampling.max_tokens or self._config.default_max_tokens, max_response)
                resolved = dataclasses.replace(sampling, max_tokens=max_tokens)
                tokenized.append(_TokenizedPrompt(prompt.group_id, token_ids, resolved))
            except InvalidRequest as error:
                for violation in error.violations:
                    wrong.add(f"prompts[{index}].{violation.field}", violation.description)
        wrong.raise_if_any()
        return tokenized

    def _token_ids(self, content: PromptContent, limit: TimeLimit) -> list[int]:
        vocabulary_size = self._engine.info.vocabulary_size
        if not isinstance(content, str) and content and isinstance(content[0], int):
            token_ids = cast(Sequence[int], content)
            self._max_response_tokens(len(token_ids))  # first, because it is cheap
            check_vocabulary("tokens.token_ids", token_ids, vocabulary_size)
            return list(token_ids)
        text = cast(str | Sequence[Message], content)
        kind = "text" if isinstance(text, str) else "chat"
        num_chars, max_chars = _num_chars(text), self._max_chars
        if num_chars > max_chars:
            raise InvalidRequest.field(
                kind,
                f"has {num_chars} characters; required: at most {max_chars} ({MAX_CHARS_PER_TOKEN} × max_model_len)",
            )
        try:
            limit.check()
            ids = self._engine.tokenize(text, limit)
        except LimitReached as error:
            raise InvalidRequest.field(kind, f"tokenizing was stopped: {error}") from error
        if not ids:
            raise InvalidRequest.field(kind, "has no tokens; required: at least one")
        check_vocabulary(kind, ids, vocabulary_size)
        return ids

    @property
    def _max_chars(self) -> int:
        return MAX_CHARS_PER_TOKEN * self._engine.info.max_model_len

    def _limit(self) -> TimeLimit:
        return TimeLimit(_REQUEST_S, each_s=_PROMPT_S, max_chars=self._max_chars + _TEMPLATE_CHARS)

    def _max_response_tokens(self, num_prompt_tokens: int) -> int:
        """Return how many response tokens fit after a prompt. Raises `InvalidRequest` if none do."""
        max_model_len = self._engine.info.max_model_len
        if num_prompt_tokens >= max_model_len:
            raise InvalidRequest.field(
                "prompt",
                f"has {num_prompt_tokens} tokens; required: at most {max_model_len - 1}, because max_model_len is "
                f"{max_model_len} and a response needs at least one token",
            )
        return max_model_len - num_prompt_tokens


def check_vocabulary(field: str, token_ids: Sequence[int], vocabulary_size: int) -> None:
    """Raise `InvalidRequest` for a token id that the model has no embedding for."""
    unknown = next((token for token in token_ids if not 0 <= token < vocabulary_size), None)
    if unknown is not None:
        raise InvalidRequest.field(
            field, f"has token {unknown}; required: 0 to {vocabulary_size - 1}, the model's vocabulary"
        )


def rollout_seed(seed: int, group_id: str, rollout_index: int) -> int:
    """Return the seed of one rollout, below 2^63. It does not depend on the order in which rollouts run."""
    digest = hashlib.sha256(f"{seed}/{rollout_index}/{group_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _num_chars(content: str | Sequence[Message]) -> int:
    if isinstance(content, str):
        return len(content)
    return sum(len(turn["content"]) + len(turn["role"]) for turn in content)


def _are_short(prompts: Sequence[Prompt]) -> bool:
    """Return whether tokenizing is fast enough for the event loop. Chat templates are programs and may be slow."""
    num_chars = 0
    for prompt in prompts:
        if not prompt.content or isinstance(prompt.content[0], dict):
            return False
        num_chars += len(prompt.content)
    return len(prompts) <= _MAX_INLINE_PROMPTS and num_chars <= _MAX_INLINE_CHARS


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
