"""The `vllm` engine: runs AsyncLLM in child processes with a recorder in its workers.

Submits rollouts, collects or frees their records, and replaces weights.

Shapes: T response tokens, d the model's width.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from poise.errors import BackendDown, InvalidRequest, Unusable
from poise.generation.config import GenerationConfig
from poise.generation.engine import EngineInfo, EngineRequest
from poise.generation.engines.vllm.collector import Collector
from poise.generation.engines.vllm.launch import ModelFacts, check_version, import_vllm, launch, num_slots, read_model
from poise.generation.engines.vllm.load_progress import StageFile
from poise.generation.engines.vllm.lora import adapter_request
from poise.generation.engines.vllm.worker_client import (
    call_engine,
    call_workers,
    load_adapter,
    load_weights,
    prepare_weights,
    receive_payload,
)
from poise.generation.feature_pooling import build_features, pooled_response
from poise.generation.prompts.time_limit import TimeLimit
from poise.generation.prompts.tokenizer import Tokenizer
from poise.generation.weights.adapter_files import WEIGHTS_FILE, check_adapter, read_config
from poise.generation.weights.manifest import check_shapes
from poise.generation.weights.process_group import GroupPayload
from poise.runtime.startup import Startup
from poise_client.types import EncodedPrompt, FinishReason, Message, Rollout, RolloutId, Sampling, VersionSpan

logger = logging.getLogger(__name__)

_SHUTDOWN_S = 10.0
"""Time for vLLM's processes to end before they are killed."""

_FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class VllmEngine:
    """Implements `Engine` with vLLM."""

    def __init__(self, config: GenerationConfig, startup: Startup | None = None) -> None:
        self.config = config
        self._startup = startup or Startup("loading the model")
        self._has_started = False
        self._facts: ModelFacts | None = None
        self._tokenizer: Tokenizer | None = None
        self.llm: Any = None
        """vLLM's `AsyncLLM`; None before `start` and after `stop`."""
        self._collector: Collector | None = None
        self._lora: Any = None
        """vLLM's request for the served adapter, sent with each rollout; None without `lora`."""
        self._process_group_backend = ""
        self._is_broken = False
        """Whether replacing the weights failed halfway."""
        self._obstacle = ""
        """Why the last weights could not be prepared."""
        self._slots = asyncio.Semaphore(num_slots(config))
        self._request_ids = itertools.count()
        self._updating = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()

    @property
    def info(self) -> EngineInfo:
        """See `Engine`."""
        if self._facts is None or self.llm is None:
            raise self._not_serving()
        return self._facts.info

    async def start(self) -> None:
        """See `Engine`."""
        check_version()
        self._startup.begin("loading the tokenizer")
        self._tokenizer = await asyncio.to_thread(Tokenizer.load, self.config.model)
        self._startup.begin("reading the model's configuration")
        self._facts = await asyncio.to_thread(read_model, self.config, self._tokenizer.digest)
        try:
            self._startup.begin("importing vLLM")
            await asyncio.to_thread(import_vllm, self.config)
            self._startup.begin("starting vLLM")
            with contextlib.closing(StageFile()) as stages, self._startup.reported_by(stages.read):
                self.llm = await asyncio.to_thread(launch, self.config, self._facts)
            self._startup.begin("preparing weight updates")
            await self._prepare_updates()
        except (ValueError, NotImplementedError) as error:  # pydantic's errors are ValueErrors too
            await self.stop()
            raise Unusable(f"vLLM cannot serve {self.config.model} with these settings: {error}") from error
        except Exception as error:  # vLLM raises many types; its processes logged the reason
            await self.stop()
            raise BackendDown(f"vLLM did not start: {error}") from error
        self._collector = Collector(self.llm)
        self._has_started = True

    async def stop(self) -> None:
        """See `Engine`."""
        engine, self.llm, self._collector = self.llm, None, None
        if engine is not None:
            if engine.output_handler is not None:
                engine.output_handler.cancel()  # else it reports the shutdown as an error
            await asyncio.to_thread(engine.shutdown, _SHUTDOWN_S)

    def is_alive(self) -> bool:
        """See `Engine`."""
        return self.llm is not None and not self._is_broken and not self.llm.errored

    def tokenize(self, content: str | Sequence[Message], limit: TimeLimit | None = None) -> list[int]:
        """See `Engine`."""
        return self._loaded_tokenizer().encode(content, limit)

    async def generate(self, request: EngineRequest) -> Rollout:
        """See `Engine`."""
        return await self._in_slot(request)

    async def encode(self, group_id: str, prompt_token_ids: Sequence[int]) -> EncodedPrompt:
        """See `Engine`. Samples one token, which takes only the prompt's forward pass."""
        sampling = Sampling(temperature=0.0, max_tokens=1)
        rollout = await self._in_slot(EngineRequest(RolloutId("", 0, group_id, 0), prompt_token_ids, sampling))
        version = rollout.version_spans[0].policy_version
        return EncodedPrompt(group_id, len(prompt_token_ids), rollout.features.prompt_hidden, version)

    @property
    def process_group_backend(self) -> str:
        """See `Engine`."""
        return self._process_group_backend

    async def receive_payload(self, payload: GroupPayload) -> None:
        """See `Engine`. The first worker receives on a thread; later all workers read the file."""
        if not self.is_alive():
            raise self._not_serving()
        await receive_payload(self.llm, payload)

    async def update_weights(self, weights: Path, policy_version: int) -> float:
        """See `Engine`."""
        if self._facts is None or not self.is_alive():
            raise self._not_serving()
        check_shapes(self._facts.parameter_shapes, await asyncio.to_thread(_read_shapes, weights))
        async with self._updating:
            await self.prepare_weights(weights)
            return await self.load_weights(weights, policy_version)

    async def prepare_weights(self, weights: Path) -> None:
        """Prepare the weights in a file while sampling continues, where that is possible."""
        self._obstacle = await prepare_weights(self.llm, weights, self._obstacle)

    async def load_weights(self, weights: Path, policy_version: int) -> float:
        """Replace the weights, prepared or not. Return the seconds for which generation paused."""
        return await self._replace(lambda: load_weights(self.llm, weights, policy_version))

    async def update_adapter(self, folder: Path, policy_version: int) -> float:
        """See `Engine`."""
        if self._facts is None or not self.is_alive():
            raise self._not_serving()
        rank, _ = read_config(folder)
        shapes = await asyncio.to_thread(_read_shapes, folder / WEIGHTS_FILE)
        check_adapter(self._facts.parameter_shapes, shapes, rank)
        async with self._updating:
            return await self._replace(lambda: load_adapter(self.llm, folder, policy_version))

    async def num_open_rollouts(self) -> int:
        """Return the number of rollouts that have a slot in the worker's recorder."""
        counts: list[int] = await call_workers(self.llm, "poise_num_open")
        return max(counts)

    async def _in_slot(self, request: EngineRequest) -> Rollout:
        """Sample a rollout in a slot. Release the slot only once vLLM and the worker have freed the rollout."""
        if self._collector is None or not self.is_alive():
            raise self._not_serving()
        request_id = f"poise-{next(self._request_ids)}"
        await self._slots.acquire()
        try:
            rollout = await self._sample(request_id, request, self.config.prompt_pool_tokens)
        except BaseException:
            task = asyncio.create_task(self._clean_up(request_id), name=f"clean-up-{request_id}")
            self._background.add(task)
            task.add_done_callback(self._background.discard)
            raise
        self._slots.release()
        return rollout

    async def _clean_up(self, request_id: str) -> None:
        try:
            if self._collector is not None and self.is_alive():
                # vLLM may not have aborted it: a task cancelled during submission can leave the request running.
                await self.llm.abort(request_id)
                await self._collector.drop(request_id)
        except Exception:
            if self.is_alive():
                logger.exception("freeing rollout %s failed", request_id)
        finally:
            self._slots.release()

    async def _sample(self, request_id: str, request: EngineRequest, num_pooled_prompt_tokens: int) -> Rollout:
        started = time.monotonic()
        assert self._collector is not None  # noqa: S101 (checked before)
        prompt_token_ids = request.prompt_token_ids
        params = self._sampling_params(request_id, request.sampling, num_pooled_prompt_tokens)
        last, token_ids, first_token_s = await self._run(request_id, prompt_token_ids, params)
        while last.finish_reason == "abort" and not token_ids:
            # A push aborted it before its first token: start again under the new weights.
            await self._collector.drop(request_id)
            last, token_ids, first_token_s = await self._run(request_id, prompt_token_ids, params)
        tokenizer = self._loaded_tokenizer()
        window, spans = pooled_response(tokenizer.token_texts(token_ids), self.config.response_pool_tokens)
        record = await self._collector.collect(request_id, len(token_ids), window)
        if record is None:
            raise BackendDown(f"vLLM's worker did not record all of rollout {request_id}")
        prompt_hidden_d, response_hidden_d, logprobs_T, entropies_T, sum_squared_probs_T = (
            np.frombuffer(array, np.float32) for array in record
        )
        if not response_hidden_d.size:
            # vLLM sampled so far past a stop string that it overwrote these states. Pool them in another pass, as the
            # last tokens of a prompt.
            prefix = [*prompt_token_ids, *token_ids[: window.end]]
            again = EngineRequest(request.id, prefix, Sampling(temperature=0.0, max_tokens=1))
            rollout = await self._sample(request_id, again, window.end - window.start)
            response_hidden_d = rollout.features.prompt_hidden
        return Rollout(
            id=request.id,
            token_ids=np.array(token_ids, np.int32),
            logprobs=logprobs_T,
            token_entropies=entropies_T.astype(np.float16),
            sum_squared_probs=sum_squared_probs_T.astype(np.float16),
            features=build_features(prompt_hidden_d, response_hidden_d, entropies_T, spans),
            version_spans=tuple(VersionSpan(s.start, s.end, int(s.version)) for s in last.weight_versions or ()),
            finish_reason=_FINISH_REASONS[last.finish_reason],
            text=tokenizer.decode(token_ids),
            first_token_s=first_token_s,
            total_s=time.monotonic() - started,
        )

    async def _run(self, request_id: str, prompt_token_ids: Sequence[int], params: Any) -> tuple[Any, list[int], float]:
        """Sample in vLLM. Return its last output, all tokens, and the seconds to the first token."""
        from vllm.inputs import tokens_input

        started = time.monotonic()
        token_ids: list[int] = []
        first_token_s = 0.0
        last = None
        try:
            async for output in self.llm.generate(
                tokens_input(list(prompt_token_ids)), params, request_id=request_id, lora_request=self._lora
            ):
                last = output.outputs[0]
                first_token_s = first_token_s or time.monotonic() - started
                token_ids += last.token_ids
        except Exception as error:
            if self.is_alive():
                raise
            raise BackendDown(f"vLLM died: {error}", retry_after_s=1.0) from error
        if last is None or last.finish_reason not in _FINISH_REASONS:
            raise BackendDown(f"vLLM ended rollout {request_id} with finish reason {last and last.finish_reason}")
        return last, token_ids, first_token_s

    def _sampling_params(self, request_id: str, sampling: Sampling, num_pooled_prompt_tokens: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        tokenizer = self._loaded_tokenizer()
        # A stop string with a special token only matches text that keeps special tokens.
        keeps_special_tokens = tokenizer.contains_special_token(sampling.stop)
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            stop=list(sampling.stop),
            include_stop_str_in_output=True,
            skip_special_tokens=not keeps_special_tokens,
            stop_token_ids=sorted(tokenizer.stop_token_ids.union(sampling.stop_token_ids)),
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.DELTA,
            extra_args={"poise_id": request_id, "poise_pool_tokens": num_pooled_prompt_tokens},
        )

    async def _prepare_updates(self) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        if self.config.lora is None:
            init = self.llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))
            await call_engine(self.llm, init)
        else:
            await call_workers(self.llm, "poise_add_empty_adapter")
            self._lora = adapter_request()
        await call_engine(self.llm, self.llm.update_weight_version("0"))
        await call_engine(self.llm, self.llm.get_supported_tasks())  # vLLM caches the result for all rollouts
        if self.config.nccl:
            self._process_group_backend = (await call_workers(self.llm, "poise_process_group_backend"))[0]

    async def _replace(self, load: Callable[[], Coroutine[Any, Any, None]]) -> float:
        """Replace the weights at a step boundary; return the seconds for which generation paused.

        A failure can leave a mix of versions, so the engine then counts as dead.
        """
        started = time.monotonic()
        try:
            # With `keep`, running rollouts are frozen, and vLLM computes their tokens again under the new weights.
            await call_engine(self.llm, self.llm.pause_generation(mode=self.config.in_flight))
            await call_engine(self.llm, load())
            await call_engine(self.llm, self.llm.resume_generation())
        except BaseException as error:
            self._is_broken = True
            if isinstance(error, Exception):
                raise BackendDown(f"replacing the weights failed halfway; the engine must restart: {error}") from error
            raise
        return time.monotonic() - started

    def _not_serving(self) -> BackendDown:
        """Return the error for calls before vLLM started or after it died."""
        if not self._has_started:
            return self._startup.error()
        reason = "replacing the weights failed halfway" if self._is_broken else "vLLM died"
        return BackendDown(f"{reason}; the process restarts", retry_after_s=1.0)

    def _loaded_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise self._not_serving()
        return self._tokenizer


def _read_shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(weights, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise InvalidRequest.field("weights", f"{weights} cannot be read: {error}") from error
