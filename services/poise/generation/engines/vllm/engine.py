"""The `vllm` engine: AsyncLLM in child processes, our recorder in its workers.

Owns the life of a rollout in vLLM, from submitting it to freeing what the worker kept, and the exchange of weights.

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
from poise.generation.engine import EngineEncoding, EngineInfo, EngineRequest, EngineRollout
from poise.generation.engines.vllm.collector import Collector
from poise.generation.engines.vllm.launch import ModelFacts, check_version, import_vllm, launch, num_slots, read_model
from poise.generation.engines.vllm.load_progress import StageFile
from poise.generation.engines.vllm.lora import adapter_request
from poise.generation.engines.vllm.weights.process_group import WorkerReceiver
from poise.generation.engines.vllm.weights.updates import load_adapter, load_weights, prepare_weights
from poise.generation.engines.vllm.worker_calls import answered, ask_workers
from poise.generation.feature_pooling import build_features, pooled_response
from poise.generation.prompts.time_limit import TimeLimit
from poise.generation.prompts.tokenizer import Tokenizer
from poise.generation.weights.adapter_files import WEIGHTS_FILE, check_adapter, read_config
from poise.generation.weights.manifest import check_weights
from poise.generation.weights.payload import Body
from poise.runtime.startup import Startup
from poise_client.types import FinishReason, Floats, Message, Sampling, VersionSpan

logger = logging.getLogger(__name__)

_SHUTDOWN_S = 10.0
"""How long vLLM's processes may take to end before they are killed."""

_FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class VllmEngine:
    """See `Engine`."""

    def __init__(self, config: GenerationConfig, startup: Startup | None = None) -> None:
        self._config = config
        self._startup = startup or Startup("loading the model")
        self._has_started = False
        self._facts: ModelFacts | None = None
        self._tokenizer: Tokenizer | None = None
        self._engine: Any = None
        self._collector: Collector | None = None
        self._lora: Any = None
        """What each rollout names, for vLLM to compute it with the adapter that is served."""
        self._receiver: WorkerReceiver | None = None
        self._group_backend = ""
        self._broken = False
        self._obstacle = ""
        """What kept the last weights from being made ready beforehand."""
        self._slots = asyncio.Semaphore(num_slots(config))
        self._rollout_ids = itertools.count()
        self._updating = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()

    @property
    def info(self) -> EngineInfo:
        """See `Engine`."""
        if self._facts is None or self._engine is None:
            raise self._not_serving()
        return self._facts.info

    async def start(self) -> None:
        """See `Engine`."""
        check_version()
        self._startup.begin("loading the tokenizer")
        self._tokenizer = await asyncio.to_thread(Tokenizer.load, self._config.model)
        self._startup.begin("reading the model's configuration")
        self._facts = await asyncio.to_thread(read_model, self._config, self._tokenizer.digest)
        try:
            self._startup.begin("importing vLLM")
            await asyncio.to_thread(import_vllm, self._config)
            self._startup.begin("starting vLLM")
            with contextlib.closing(StageFile()) as stages, self._startup.asking(stages.read):
                self._engine = await asyncio.to_thread(launch, self._config, self._facts)
            self._startup.begin("preparing weight updates")
            await self._prepare_updates()
        except (ValueError, NotImplementedError) as error:  # pydantic's errors are ValueErrors too
            await self.stop()
            raise Unusable(f"vLLM cannot serve {self._config.model} with these settings: {error}") from error
        except Exception as error:  # whatever vLLM raises; its processes have logged the reason
            await self.stop()
            raise BackendDown(f"vLLM did not start: {error}") from error
        self._collector = Collector(self._engine)
        self._has_started = True

    async def stop(self) -> None:
        """See `Engine`."""
        engine, self._engine, self._collector = self._engine, None, None
        if engine is not None:
            if engine.output_handler is not None:
                engine.output_handler.cancel()  # or it would report the end of the engine as an error
            await asyncio.to_thread(engine.shutdown, _SHUTDOWN_S)

    def is_alive(self) -> bool:
        """See `Engine`."""
        return self._engine is not None and not self._broken and not self._engine.errored

    def tokenize(self, content: str | Sequence[Message], limit: TimeLimit | None = None) -> list[int]:
        """See `Engine`."""
        return self._loaded_tokenizer().encode(content, limit)

    async def generate(self, request: EngineRequest) -> EngineRollout:
        """See `Engine`."""
        return await self._in_slot(request.prompt_token_ids, request.sampling)

    async def encode(self, prompt_token_ids: Sequence[int]) -> EngineEncoding:
        """See `Engine`. vLLM samples a token, whose pass is the prompt's own."""
        rollout = await self._in_slot(prompt_token_ids, Sampling(temperature=0.0, max_tokens=1))
        return EngineEncoding(rollout.features.prompt_hidden, rollout.version_spans[0].policy_version)

    @property
    def group_backend(self) -> str:
        """See `Engine`."""
        return self._group_backend

    async def receive(self, body: Body) -> None:
        """See `Engine`. The first worker receives, on a thread, and all of them read the file."""
        if self._receiver is None or not self.is_alive():
            raise self._not_serving()
        await self._receiver.receive(body)

    async def update_weights(self, weights: Path, policy_version: int) -> float:
        """See `Engine`."""
        if self._facts is None or not self.is_alive():
            raise self._not_serving()
        check_weights(self._facts.parameter_shapes, await asyncio.to_thread(_read_shapes, weights))
        async with self._updating:
            self._obstacle = await prepare_weights(self._engine, weights, self._obstacle)
            return await self._exchange(lambda: load_weights(self._engine, weights, policy_version))

    async def update_adapter(self, folder: Path, policy_version: int) -> float:
        """See `Engine`."""
        if self._facts is None or not self.is_alive():
            raise self._not_serving()
        rank, _ = read_config(folder)
        shapes = await asyncio.to_thread(_read_shapes, folder / WEIGHTS_FILE)
        check_adapter(self._facts.parameter_shapes, shapes, rank)
        async with self._updating:
            return await self._exchange(lambda: load_adapter(self._engine, folder, policy_version))

    async def num_open_rollouts(self) -> int:
        """Return for how many rollouts the worker holds memory."""
        counts: list[int] = await ask_workers(self._engine, "poise_num_open")
        return max(counts)

    async def _in_slot(self, prompt_token_ids: Sequence[int], sampling: Sampling) -> EngineRollout:
        """Sample a rollout. However this ends, vLLM and the worker are rid of it before its slot is given on."""
        if self._collector is None or not self.is_alive():
            raise self._not_serving()
        rollout_id = f"poise-{next(self._rollout_ids)}"
        await self._slots.acquire()
        try:
            num_pooled = self._config.prompt_pool_tokens
            rollout = await self._sample(rollout_id, prompt_token_ids, sampling, num_pooled)
        except BaseException:
            task = asyncio.create_task(self._clean_up(rollout_id), name=f"clean-up-{rollout_id}")
            self._background.add(task)
            task.add_done_callback(self._background.discard)
            raise
        self._slots.release()
        return rollout

    async def _clean_up(self, rollout_id: str) -> None:
        try:
            if self._collector is not None and self.is_alive():
                # Again: a task cancelled while it was submitting may have left the request running.
                await self._engine.abort(rollout_id)
                await self._collector.drop(rollout_id)
        except Exception:
            if self.is_alive():
                logger.exception("freeing %s failed", rollout_id)
        finally:
            self._slots.release()

    async def _sample(
        self, rollout_id: str, prompt_token_ids: Sequence[int], sampling: Sampling, num_pooled_prompt_tokens: int
    ) -> EngineRollout:
        started = time.monotonic()
        assert self._collector is not None  # noqa: S101 (checked before)
        params = self._sampling_params(rollout_id, sampling, num_pooled_prompt_tokens)
        last, token_ids, first_token_s = await self._run(rollout_id, prompt_token_ids, params)
        while last.finish_reason == "abort" and not token_ids:
            # New weights came before its first token: nothing is lost by beginning again, under them.
            await self._collector.drop(rollout_id)
            last, token_ids, first_token_s = await self._run(rollout_id, prompt_token_ids, params)
        tokenizer = self._loaded_tokenizer()
        window, spans = pooled_response(tokenizer.token_texts(token_ids), self._config.response_pool_tokens)
        record = await self._collector.collect(rollout_id, len(token_ids), window)
        if record is None:
            raise BackendDown(f"the worker did not see all of {rollout_id}")
        prompt_hidden_d, response_hidden_d, logprobs_T, entropies_T = (np.frombuffer(r, np.float32) for r in record)
        if not response_hidden_d.size:
            num_pooled = window.end - window.start
            prefix = [*prompt_token_ids, *token_ids[: window.end]]
            response_hidden_d = await self._pool_again(rollout_id, prefix, num_pooled)
        return EngineRollout(
            token_ids=np.array(token_ids, np.int32),
            logprobs=logprobs_T,
            token_entropies=entropies_T,
            features=build_features(prompt_hidden_d, response_hidden_d, entropies_T, spans),
            version_spans=tuple(VersionSpan(s.start, s.end, int(s.version)) for s in last.weight_versions or ()),
            finish_reason=_FINISH_REASONS[last.finish_reason],
            text=tokenizer.decode(token_ids),
            first_token_s=first_token_s,
            total_s=time.monotonic() - started,
        )

    async def _run(self, rollout_id: str, prompt_token_ids: Sequence[int], params: Any) -> tuple[Any, list[int], float]:
        """Sample in vLLM; return its last output, all tokens, and the time to the first, s."""
        from vllm.inputs import tokens_input

        started = time.monotonic()
        token_ids: list[int] = []
        first_token_s = 0.0
        last = None
        try:
            async for output in self._engine.generate(
                tokens_input(list(prompt_token_ids)), params, request_id=rollout_id, lora_request=self._lora
            ):
                last = output.outputs[0]
                first_token_s = first_token_s or time.monotonic() - started
                token_ids += last.token_ids
        except Exception as error:
            if self.is_alive():
                raise
            raise BackendDown(f"vLLM died: {error}", retry_after_s=1.0) from error
        if last is None or last.finish_reason not in _FINISH_REASONS:
            raise BackendDown(f"vLLM ended {rollout_id} with {last and last.finish_reason}")
        return last, token_ids, first_token_s

    async def _pool_again(self, rollout_id: str, token_ids: Sequence[int], num_pooled: int) -> Floats:
        """Return the pooled states of the last tokens by another pass: vLLM ran on too far past a stop string."""
        again = await self._sample(rollout_id, token_ids, Sampling(temperature=0.0, max_tokens=1), num_pooled)
        return again.features.prompt_hidden

    def _sampling_params(self, rollout_id: str, sampling: Sampling, num_pooled_prompt_tokens: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        tokenizer = self._loaded_tokenizer()
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            stop=list(sampling.stop),
            include_stop_str_in_output=True,
            skip_special_tokens=not tokenizer.names_special(
                sampling.stop
            ),  # or a stop that holds one would never match
            stop_token_ids=sorted(tokenizer.stop_token_ids.union(sampling.stop_token_ids)),
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.DELTA,
            extra_args={"poise_id": rollout_id, "poise_pool_tokens": num_pooled_prompt_tokens},
        )

    async def _prepare_updates(self) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        if self._config.lora is None:
            init = self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))
            await answered(self._engine, init)
        else:
            await ask_workers(self._engine, "poise_add_empty_adapter")
            self._lora = adapter_request()
        await answered(self._engine, self._engine.update_weight_version("0"))
        await answered(self._engine, self._engine.get_supported_tasks())  # kept: no rollout need ask for it
        if self._config.nccl:
            self._receiver = WorkerReceiver(self._engine)
            self._group_backend = await self._receiver.backend()

    async def _exchange(self, load: Callable[[], Coroutine[Any, Any, None]]) -> float:
        """Exchange weights at a step boundary. A failure in between leaves a mix: the engine counts as dead."""
        started = time.monotonic()
        try:
            # Kept rollouts are frozen; they begin again from their tokens so far, under the new weights.
            await answered(self._engine, self._engine.pause_generation(mode=self._config.in_flight))
            await answered(self._engine, load())
            await answered(self._engine, self._engine.resume_generation())
        except BaseException as error:
            self._broken = True
            if isinstance(error, Exception):
                raise BackendDown(f"an update broke off halfway, the engine must restart: {error}") from error
            raise
        return time.monotonic() - started

    def _not_serving(self) -> BackendDown:
        """Return the error to raise while vLLM starts, or after it died."""
        if not self._has_started:
            return self._startup.error()
        why = "an update of the weights broke off halfway" if self._broken else "vLLM died"
        return BackendDown(f"{why}; the process restarts", retry_after_s=1.0)

    def _loaded_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise self._not_serving()
        return self._tokenizer


def _read_shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(weights, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise InvalidRequest.field("weights", f"cannot be read: {error}") from error
