"""The `torch` engine: samples with transformers, one token of one rollout at a time.

All work on the model runs on one thread, one token per call. So rollouts interleave, a cancelled rollout stops at its
next token, and new weights take effect between two tokens.

Shapes: P prompt tokens, T response tokens, V vocabulary, d the model's width.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from safetensors import SafetensorError

from poise.algorithms.features import prompt_window
from poise.errors import BackendDown, Unusable
from poise.generation.config import GenerationConfig
from poise.generation.engine import EngineInfo, EngineRequest
from poise.generation.engines.transformers.forward import TorchForward
from poise.generation.engines.transformers.lora import (
    LoadedAdapter,
    TorchAdapter,
    read_adapter,
    read_tensors,
    shapes_of,
)
from poise.generation.engines.transformers.sampling import sample_token
from poise.generation.feature_pooling import build_features, mean_or_zeros, pooled_response
from poise.generation.prompts.time_limit import TimeLimit
from poise.generation.prompts.tokenizer import Tokenizer, resolve_feature_layer, resolve_max_model_len
from poise.generation.weights.manifest import check_shapes
from poise.generation.weights.process_group import GroupPayload, GroupReceiver, wait_for_payload
from poise.runtime.models.decoder import decoder_layers
from poise.runtime.models.generation_config import load_generation_config
from poise.runtime.network.broadcast_group import backend_of
from poise.runtime.startup import Startup
from poise_client.types import EncodedPrompt, FinishReason, Floats, Message, Rollout, VersionSpan

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class _Running:
    """An unfinished rollout."""

    request: EngineRequest
    generator: torch.Generator
    started: float
    cache: transformers.Cache | None = None
    cache_version: int | None = None
    """Policy version that computed `cache`."""
    prompt_hidden_d: Floats | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    sum_squared_probs: list[float] = field(default_factory=list)
    hidden: list[Floats] = field(default_factory=list)
    """Hidden state of each response token that went through the model, [d] each."""
    versions: list[int] = field(default_factory=list)
    first_token_s: float = 0.0


class TorchEngine:
    """Implements `Engine` with transformers."""

    def __init__(self, config: GenerationConfig, startup: Startup | None = None) -> None:
        self.config = config
        self._startup = startup or Startup("loading the model")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="torch-engine")
        self._receiver = GroupReceiver(config.torch.device)
        self.model: Any = None
        self._forward: TorchForward | None = None
        self._tokenizer: Tokenizer | None = None
        self._info: EngineInfo | None = None
        self._adapter: TorchAdapter | None = None
        self._hidden: torch.Tensor | None = None
        self._version = 0
        self._stopped = False

    @property
    def info(self) -> EngineInfo:
        """See `Engine`."""
        if self._info is None:
            raise self._startup.error()
        return self._info

    async def start(self) -> None:
        """See `Engine`."""
        await self.run_on_thread(self._load)

    async def stop(self) -> None:
        """See `Engine`."""
        self._stopped = True
        self.model = self._forward = None
        await asyncio.to_thread(self._receiver.abort)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def is_alive(self) -> bool:
        """See `Engine`."""
        return self.model is not None

    def tokenize(self, content: str | Sequence[Message], limit: TimeLimit | None = None) -> list[int]:
        """See `Engine`."""
        return self._loaded_tokenizer().encode(content, limit)

    async def generate(self, request: EngineRequest) -> Rollout:
        """See `Engine`."""
        generator = torch.Generator(self.config.torch.device)
        if request.sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(request.sampling.seed)
        running = _Running(request, generator, time.monotonic())
        reason: FinishReason | None = None
        while reason is None:
            reason = await self.run_on_thread(lambda: self._sample_token(running))
        return self._finish(running, reason)

    async def encode(self, group_id: str, prompt_token_ids: Sequence[int]) -> EncodedPrompt:
        """See `Engine`."""
        return await self.run_on_thread(lambda: self._encode(group_id, prompt_token_ids))

    @property
    def process_group_backend(self) -> str:
        """See `Engine`."""
        return backend_of(self.config.torch.device) if self.config.nccl else ""

    async def receive_payload(self, payload: GroupPayload) -> None:
        """See `Engine`."""

        async def outcome() -> str | None:
            return self._receiver.outcome()

        try:
            self._receiver.start(payload)
        except RuntimeError as error:
            raise BackendDown(str(error)) from error
        await wait_for_payload(outcome, lambda: asyncio.to_thread(self._receiver.abort), payload.timeout_s)

    async def update_weights(self, weights: Path, policy_version: int) -> float:
        """See `Engine`."""
        new = await asyncio.to_thread(self._read_weights, weights)
        return await self.run_on_thread(lambda: self._replace_weights(new, policy_version))

    async def update_adapter(self, folder: Path, policy_version: int) -> float:
        """See `Engine`."""
        new = await asyncio.to_thread(self._read_adapter, folder)
        return await self.run_on_thread(lambda: self._replace_adapter(new, policy_version))

    async def run_on_thread(self, work: Callable[[], T]) -> T:
        """Run work on the model's thread, one call at a time.

        Raises:
            BackendDown: the engine was stopped. It replaces the CancelledError of waiting calls and the exception of
                the running call.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (asyncio.CancelledError, Exception) as error:
            task = asyncio.current_task()
            if not self._stopped or (task is not None and task.cancelling()):
                raise
            raise BackendDown("the engine was stopped") from error

    def _loaded_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise self._startup.error()
        return self._tokenizer

    def _load(self) -> None:
        settings = self.config.torch
        torch.set_num_threads(settings.threads)
        try:
            self._startup.begin("loading the tokenizer")
            tokenizer = Tokenizer.load(self.config.model)
            self._startup.begin("loading weights")
            generation_config, repairs = load_generation_config(self.config.model, transformers.GenerationConfig)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                self.config.model,
                dtype=self.config.dtype,
                **({"generation_config": generation_config} if repairs else {}),
            )
            if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
                model.set_attn_implementation("eager")  # the other implementations ignore the cap
            layers = decoder_layers(model)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise Unusable(f"model {self.config.model} cannot be loaded: {error}") from error
        self._startup.begin(f"moving weights to {settings.device}")
        try:
            model = model.to(settings.device).eval()
        except (RuntimeError, AssertionError) as error:  # torch asserts that it supports the device
            raise Unusable(f"torch.device {settings.device} cannot be used: {error}") from error
        text_config = model.config.get_text_config()
        layer = resolve_feature_layer(self.config.feature_layer, len(layers))
        layers[layer].register_forward_hook(self._save_hidden)
        self._forward = TorchForward(model, self.config.model)
        self.model, self._tokenizer, self._adapter = model, tokenizer, TorchAdapter(model)
        self._info = EngineInfo(
            engine="torch",
            model=self.config.model,
            hidden_size=text_config.hidden_size,
            num_layers=len(layers),
            feature_layer=layer,
            max_model_len=resolve_max_model_len(self.config.max_model_len, model.config),
            vocabulary_size=text_config.vocab_size,
            tokenizer_digest=tokenizer.digest,
        )

    def _save_hidden(self, module: Any, inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, (tuple, list)) else output
        self._hidden = states[0].float()

    @torch.inference_mode()
    def _sample_token(self, running: _Running) -> FinishReason | None:
        """Sample one token. Return the finish reason if the rollout ends, else None."""
        forward = self._forward
        assert forward is not None  # noqa: S101 (loaded)
        first = running.prompt_hidden_d is None
        if self.config.in_flight == "abort" and not first and running.cache_version != self._version:
            return "abort"
        if running.cache is None or running.cache_version != self._version:
            # The cache holds keys and values of the old weights: compute the whole sequence again.
            running.cache, running.cache_version = forward.new_cache(), self._version
            ids = [*running.request.prompt_token_ids, *running.token_ids]
        else:
            ids = running.token_ids[-1:]
        logits_V = forward(torch.tensor([ids], device=self.config.torch.device), running.cache)
        hidden: Floats = self._hidden_rows()
        if first:
            running.prompt_hidden_d = self._pool_prompt(hidden)
        else:
            running.hidden.append(hidden[-1])

        sampling = running.request.sampling
        logprobs_V = torch.log_softmax(logits_V.float() / (sampling.temperature or 1.0), -1)
        token = sample_token(logprobs_V, sampling, running.generator)
        running.token_ids.append(token)
        running.logprobs.append(float(logprobs_V[token]))
        probs_V = logprobs_V.exp()
        running.entropies.append(float(torch.special.entr(probs_V).sum()))
        running.sum_squared_probs.append(float(probs_V @ probs_V))
        running.versions.append(self._version)
        if len(running.token_ids) == 1:
            running.first_token_s = time.monotonic() - running.started
        return self._finish_reason(running)

    @torch.inference_mode()
    def _encode(self, group_id: str, prompt_token_ids: Sequence[int]) -> EncodedPrompt:
        inputs = torch.tensor([list(prompt_token_ids)], device=self.config.torch.device)
        assert self._forward is not None  # noqa: S101 (loaded)
        self._forward(inputs, None)
        hidden_d = self._pool_prompt(self._hidden_rows())
        return EncodedPrompt(group_id, len(prompt_token_ids), hidden_d, self._version)

    def _pool_prompt(self, states_Pd: Floats) -> Floats:
        return mean_or_zeros(states_Pd, prompt_window(len(states_Pd), self.config.prompt_pool_tokens))

    def _hidden_rows(self) -> Floats:
        assert self._hidden is not None  # noqa: S101 (the hook ran in the forward pass)
        rows: Floats = self._hidden.cpu().numpy()
        return rows

    def _finish_reason(self, running: _Running) -> FinishReason | None:
        tokenizer, sampling = self._loaded_tokenizer(), running.request.sampling
        if running.token_ids[-1] in tokenizer.stop_token_ids or running.token_ids[-1] in sampling.stop_token_ids:
            return "stop"
        if sampling.stop:
            text = tokenizer.decode(running.token_ids, with_special=tokenizer.contains_special_token(sampling.stop))
            if any(stop in text for stop in sampling.stop):
                return "stop"
        return "length" if len(running.token_ids) >= sampling.max_tokens else None

    def _finish(self, running: _Running, reason: FinishReason) -> Rollout:
        tokenizer = self._loaded_tokenizer()
        texts = tokenizer.token_texts(running.token_ids)
        window, spans = pooled_response(texts, self.config.response_pool_tokens)
        entropies_T = np.array(running.entropies, np.float32)
        states_Td = np.stack(running.hidden) if running.hidden else np.zeros((0, self.info.hidden_size), np.float32)
        assert running.prompt_hidden_d is not None  # noqa: S101 (set with the first token)
        return Rollout(
            id=running.request.id,
            token_ids=np.array(running.token_ids, np.int32),
            logprobs=np.array(running.logprobs, np.float32),
            token_entropies=entropies_T.astype(np.float16),
            sum_squared_probs=np.array(running.sum_squared_probs, np.float16),
            features=build_features(running.prompt_hidden_d, mean_or_zeros(states_Td, window), entropies_T, spans),
            version_spans=_version_spans(running.versions),
            finish_reason=reason,
            text=tokenizer.decode(running.token_ids),
            first_token_s=running.first_token_s,
            total_s=time.monotonic() - running.started,
        )

    def _read_weights(self, weights: Path) -> dict[str, torch.Tensor]:
        """Return the parameters in a file, checked and in the model's dtypes. Sampling continues meanwhile."""
        parameters = self._parameters()
        new = read_tensors(weights)
        check_shapes(shapes_of(parameters), shapes_of(new))
        return {name: new[name].to(parameter.dtype, copy=True) for name, parameter in parameters.items()}

    def _read_adapter(self, folder: Path) -> LoadedAdapter:
        return read_adapter(folder, self._parameters())

    def _parameters(self) -> dict[str, torch.Tensor]:
        model = self.model
        if model is None:
            raise BackendDown("the engine was stopped")
        return dict(model.named_parameters())

    def _replace_weights(self, new: dict[str, torch.Tensor], policy_version: int) -> float:
        started = time.monotonic()
        for name, parameter in self.model.named_parameters():
            parameter.data = new.pop(name).to(parameter.device)
        self._version = policy_version
        return time.monotonic() - started

    def _replace_adapter(self, new: LoadedAdapter, policy_version: int) -> float:
        started = time.monotonic()
        assert self._adapter is not None  # noqa: S101 (loaded)
        self._adapter.use(new)
        self._version = policy_version
        return time.monotonic() - started


def _version_spans(versions: Sequence[int]) -> tuple[VersionSpan, ...]:
    """Return the spans of equal versions."""
    starts = [i for i, version in enumerate(versions) if i == 0 or version != versions[i - 1]]
    ends = [*starts[1:], len(versions)]
    return tuple(VersionSpan(start, end, versions[start]) for start, end in zip(starts, ends, strict=True))
