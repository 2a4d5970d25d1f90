"""vLLM's worker, which also records hidden states, log-probabilities and entropies. vLLM's processes import it by name.

The hidden states are outputs of the model, through vLLM's interface for EAGLE-3, so torch.compile and CUDA graphs
return them too. Models without this interface need a forward hook and eager mode. Log-probabilities and entropies come
from the step's logits before vLLM applies temperature, top-k and top-p in place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform

from poise.generation.engines.vllm.load_progress import report_stage
from poise.generation.engines.vllm.lora import add_empty_adapter
from poise.generation.engines.vllm.orphans import end_with_server
from poise.generation.engines.vllm.recorder import Record, Recorder
from poise.generation.engines.vllm.think_tokens import think_close_table
from poise.generation.engines.vllm.token_statistics import scaled_logits
from poise.generation.engines.vllm.weight_loader import register_backend
from poise.generation.prompts.tokenizer import Tokenizer
from poise.generation.weights.process_group import GroupPayload, GroupReceiver
from poise.runtime.network.broadcast_group import Rendezvous, backend_of

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as BaseWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as BaseWorker

logger = logging.getLogger(__name__)

_GREEDY_BELOW = 1e-5
"""vLLM treats lower temperatures as 0."""


class PoiseWorker(BaseWorker):  # type: ignore[misc]
    """Records rollouts for `poise_collect`. All ranks compute the same states, so only rank 0 records."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        end_with_server()
        super().__init__(*args, **kwargs)
        self._recorder: Recorder | None = None
        self._hooked: torch.Tensor | None = None
        self._receiver: GroupReceiver | None = None

    def load_model(self, **kwargs: Any) -> None:
        """See vLLM."""
        self._report_stage("loading weights")
        register_backend()
        super().load_model(**kwargs)
        if self.use_v2_model_runner:
            raise RuntimeError("vLLM uses its v2 model runner, which the recorder does not support")
        layer = self.vllm_config.additional_config["poise_feature_layer"]
        self._expose_states(layer)
        if self.rank == 0:
            self._recorder = self._make_recorder()
            self.model_runner._sample = self._with_recording(self.model_runner._sample)

    def determine_available_memory(self) -> int:
        """See vLLM."""
        self._report_stage("measuring memory for the KV cache")
        num_bytes: int = super().determine_available_memory()
        return num_bytes

    def compile_or_warm_up_model(self) -> Any:
        """See vLLM."""
        self._report_stage("warming up" if self.model_config.enforce_eager else "compiling and warming up")
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
        """Return the records of the wanted rollouts; free those and the dropped ones.

        Args:
            wanted: (rollout id, num_tokens, start, end); states are pooled over response tokens [start, end).
            dropped: rollout ids.

        Returns None on ranks other than 0.
        """
        if self._recorder is None:
            return None
        for rollout_id in dropped:
            self._recorder.drop(rollout_id)
        return [self._recorder.collect(*rollout) for rollout in wanted]

    def poise_add_empty_adapter(self) -> None:
        """Serve an adapter of zeros, so that the first push can replace it in running rollouts."""
        add_empty_adapter(self.model_runner.lora_manager)

    def poise_process_group_backend(self) -> str:
        """Return the backend of the process groups that this worker can join."""
        return backend_of(str(self.device))

    def poise_receive_payload(
        self, backend: str, key: bytes, part_bytes: Sequence[int], header: bytes, path: str, timeout_s: float
    ) -> None:
        """Start receiving the payload of a push, on rank 0."""
        if self.rank == 0:
            payload = GroupPayload(Rendezvous(backend, key), tuple(part_bytes), header, Path(path), timeout_s)
            self._receiver = self._receiver or GroupReceiver(str(self.device))
            self._receiver.start(payload)

    def poise_receive_outcome(self) -> str | None:
        """See `GroupReceiver.outcome`."""
        return "" if self._receiver is None else self._receiver.outcome()

    def poise_abort_receive(self) -> None:
        """See `GroupReceiver.abort`."""
        if self._receiver is not None:
            self._receiver.abort()

    def poise_prepare_weights(self, path: str) -> tuple[int, str]:
        """See `FileWeightTransferEngine.prepare`."""
        obstacle: tuple[int, str] = self.weight_transfer_engine.prepare(path)
        return obstacle

    def poise_is_preparing(self) -> bool:
        """See `FileWeightTransferEngine.is_preparing`."""
        preparing: bool = self.weight_transfer_engine.is_preparing
        return preparing

    def poise_num_open(self) -> int:
        """See `Recorder.num_open`."""
        return 0 if self._recorder is None else self._recorder.num_open

    def _report_stage(self, stage: str) -> None:
        if self.rank == 0:
            report_stage(stage)

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
            raise RuntimeError(
                f"vLLM returns the hidden states of {type(model).__name__} in eager mode only; set vllm.enforce_eager"
            )
        layers = next(
            module
            for module in model.modules()
            if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers
        )
        layers[layer].register_forward_hook(self._save_states)
        logger.info("%s: recording hidden states with a forward hook", type(model).__name__)

    def _save_states(self, module: Any, inputs: Any, output: Any) -> None:
        # A decoder layer returns its output and the residual separately, or their sum.
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

    def _with_recording(self, sample: Callable[..., Any]) -> Callable[..., Any]:
        """Return vLLM's sampling method with recording added."""

        def sample_and_record(logits: torch.Tensor, *args: Any) -> Any:
            runner, recorder = self.model_runner, self._recorder
            assert recorder is not None  # noqa: S101 (set by `load_model`)
            # A copy, because vLLM applies temperature and truncation in place.
            logits_RV = scaled_logits(logits, runner.input_batch.sampling_metadata.temperature, _GREEDY_BELOW)
            output = sample(logits, *args)
            kept_R = ~runner.discard_request_mask.np[: logits.shape[0]].astype(bool)
            recorder.record_sampled(logits_RV, output.sampled_token_ids[:, 0], kept_R)
            return output

        return sample_and_record
