"""vLLM's worker, with a recorder beside the model. Imported inside vLLM's own processes, by name.

The states of the feature layer are outputs of the model itself (the interface made for EAGLE-3), so they are right
under torch.compile and CUDA graphs too; models without it need a hook and eager mode.
Logprobs and entropies come from the logits of the step before temperature, top-k and top-p touch them in place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform

from poise.generation.engines.vllm.load_progress import tell_stage
from poise.generation.engines.vllm.lora import add_empty_adapter
from poise.generation.engines.vllm.orphans import end_with_server
from poise.generation.engines.vllm.recorder import Record, Recorder
from poise.generation.engines.vllm.think_tokens import think_close_table
from poise.generation.engines.vllm.weights.loader import register_backend
from poise.generation.prompts.tokenizer import Tokenizer
from poise.generation.weights.payload import Body
from poise.generation.weights.process_group import GroupReceiver
from poise.runtime.network.broadcast_group import Rendezvous, backend_of

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as BaseWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as BaseWorker

logger = logging.getLogger(__name__)

_GREEDY_BELOW = 1e-5
"""Temperatures that vLLM takes for 0."""


class PoiseWorker(BaseWorker):  # type: ignore[misc]
    """Records what `poise_collect` returns. With several ranks they all hold the same, and the first records."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        end_with_server()
        super().__init__(*args, **kwargs)
        self._recorder: Recorder | None = None
        self._hooked: torch.Tensor | None = None
        self._receiver: GroupReceiver | None = None

    def load_model(self, **kwargs: Any) -> None:
        """See vLLM."""
        self._tell_stage("loading weights")
        register_backend()
        super().load_model(**kwargs)
        if self.use_v2_model_runner:
            raise RuntimeError("vLLM chose its second model runner; only the first is known")
        layer = self.vllm_config.additional_config["poise_feature_layer"]
        self._expose_states(layer)
        if self.rank == 0:
            self._recorder = self._make_recorder()
            self.model_runner._sample = self._recording(self.model_runner._sample)

    def determine_available_memory(self) -> int:
        """See vLLM."""
        self._tell_stage("measuring memory for the KV cache")
        num_bytes: int = super().determine_available_memory()
        return num_bytes

    def compile_or_warm_up_model(self) -> Any:
        """See vLLM."""
        self._tell_stage("warming up" if self.model_config.enforce_eager else "compiling and warming up")
        return super().compile_or_warm_up_model()

    def execute_model(self, scheduler_output: Any) -> Any:
        """See vLLM."""
        output = super().execute_model(scheduler_output)
        state = self.model_runner.execute_model_state
        if self._recorder is not None and state is not None:
            self._record_step(self._recorder, scheduler_output, state)
        return output

    def poise_collect(
        self, wanted: Sequence[tuple[str, int, int, int]], dropped: Sequence[str]
    ) -> list[Record | None] | None:
        """Answer and free finished rollouts, (id, num_tokens, start, end) each; free others. None but on rank 0."""
        if self._recorder is None:
            return None
        for rollout_id in dropped:
            self._recorder.drop(rollout_id)
        return [self._recorder.collect(*rollout) for rollout in wanted]

    def poise_add_empty_adapter(self) -> None:
        """Let rollouts name an adapter before one was pushed: those that run when it comes then go on with it."""
        add_empty_adapter(self.model_runner.lora_manager)

    def poise_group_backend(self) -> str:
        """Return of which groups this worker can be a member."""
        return backend_of(str(self.device))

    def poise_receive(
        self, backend: str, key: bytes, part_bytes: Sequence[int], header: bytes, path: str, timeout_s: float
    ) -> None:
        """Begin to receive the body of a push, on rank 0."""
        if self.rank == 0:
            body = Body(Rendezvous(backend, key), tuple(part_bytes), header, Path(path), timeout_s)
            self._receiver = self._receiver or GroupReceiver(str(self.device))
            self._receiver.start(body)

    def poise_received(self) -> str | None:
        """Return what went wrong; empty when all came; None while it comes."""
        return "" if self._receiver is None else self._receiver.outcome()

    def poise_abandon(self) -> None:
        """Give up what is being received."""
        if self._receiver is not None:
            self._receiver.abandon()

    def poise_prepare(self, path: str) -> tuple[int, str]:
        """Begin to make a file's weights ready while sampling goes on; return why not, after a log's level for it."""
        told: tuple[int, str] = self.weight_transfer_engine.prepare(path)
        return told

    def poise_is_preparing(self) -> bool:
        """Return whether that goes on."""
        preparing: bool = self.weight_transfer_engine.is_preparing
        return preparing

    def poise_num_open(self) -> int:
        """Return how many rollouts hold memory in the recorder."""
        return 0 if self._recorder is None else self._recorder.num_open

    def _tell_stage(self, stage: str) -> None:
        if self.rank == 0:
            tell_stage(stage)

    def _make_recorder(self) -> Recorder:
        config = self.model_config
        tokenizer = Tokenizer.load(config.tokenizer)
        texts = tokenizer.token_texts(range(config.get_vocab_size()))
        return Recorder(
            num_slots=self.vllm_config.additional_config["poise_num_slots"],
            response_pool_tokens=self.vllm_config.additional_config["poise_response_pool_tokens"],
            hidden_size=config.get_hidden_size(),
            max_model_len=config.max_model_len,
            think_table_SV=torch.from_numpy(think_close_table(texts)),
            dtype=config.dtype,
            device=self.device,
        )

    def _expose_states(self, layer: int) -> None:
        model = self.model_runner.get_model()
        num_layers = self.model_config.get_total_num_hidden_layers()
        if hasattr(model, "set_aux_hidden_state_layers"):
            model.set_aux_hidden_state_layers((layer + 1,))
            self.model_runner.use_aux_hidden_state_outputs = True
            return
        if not self.model_config.enforce_eager:
            raise RuntimeError(f"{type(model).__name__} gives its states in eager mode only: set vllm.enforce_eager")
        layers = next(
            module
            for module in model.modules()
            if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers
        )
        layers[layer].register_forward_hook(self._keep_states)
        logger.info("%s: feature states by a forward hook", type(model).__name__)

    def _keep_states(self, module: Any, inputs: Any, output: Any) -> None:
        # A decoder layer returns what it adds and what it adds it to, or their sum.
        states, residual = output if isinstance(output, tuple) else (output, None)
        self._hooked = states if residual is None else states + residual

    @torch.inference_mode()
    def _record_step(self, recorder: Recorder, scheduler_output: Any, state: Any) -> None:
        for new in scheduler_output.scheduled_new_reqs:
            extra = new.sampling_params.extra_args
            recorder.open(new.req_id, extra["poise_id"], len(new.prompt_token_ids), extra["poise_pool_tokens"])
        runner = self.model_runner
        batch = runner.input_batch
        request_ids = batch.req_ids
        scheduled = [scheduler_output.num_scheduled_tokens[request_id] for request_id in request_ids]
        num_tokens = sum(scheduled)
        states = self._hooked if state.aux_hidden_states is None else state.aux_hidden_states[0]
        assert states is not None  # noqa: S101 (hooked, or an output)
        recorder.record_hidden(
            request_ids,
            batch.num_computed_tokens_cpu[: len(request_ids)].astype(np.int64),
            np.array(scheduled, np.int64),
            runner.input_ids.gpu[:num_tokens],
            states[:num_tokens],
        )

    def _recording(self, sample: Callable[..., Any]) -> Callable[..., Any]:
        """Return vLLM's sampling of a step, made to tell the recorder."""

        def sample_and_record(logits: torch.Tensor, *args: Any) -> Any:
            runner, recorder = self.model_runner, self._recorder
            assert recorder is not None  # noqa: S101 (set before)
            logprobs_RV = _log_distribution(logits, runner.input_batch.sampling_metadata.temperature)
            output = sample(logits, *args)
            kept_R = ~runner.discard_request_mask.np[: logits.shape[0]].astype(bool)
            recorder.record_sampled(logprobs_RV, output.sampled_token_ids[:, 0], kept_R)
            return output

        return sample_and_record


def _log_distribution(logits_RV: torch.Tensor, temperature_R: torch.Tensor | None) -> torch.Tensor:
    """Return what is sampled from before any truncation; at temperature 0, the distribution at temperature 1."""
    if temperature_R is None:
        return torch.log_softmax(logits_RV.float(), -1)
    divisor = torch.where(temperature_R < _GREEDY_BELOW, 1.0, temperature_R)
    return torch.log_softmax(logits_RV.float() / divisor[:, None], -1)
