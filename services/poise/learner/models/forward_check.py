"""Checks at load that the learner's forward pass gives the model's own log-probabilities.

The reference is the model's own `forward`, one sequence at a time, with "eager" attention. `checked_forward` returns
the fastest mode whose log-probabilities and gradient agree with it on a test batch.

Shapes: N response tokens of the test batch, V vocabulary, d the model's width.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from poise.errors import Unusable
from poise.learner.config import LearnerConfig
from poise.learner.models.attention import PACKED
from poise.learner.models.backbone import recompute_layers
from poise.learner.models.forward import ForwardMode, PackedForward
from poise.learner.training.packing import PromptGroup, build_row
from poise.runtime.models.decoder import position_limit
from poise_client.types import Rollout, RolloutId, VersionSpan

logger = logging.getLogger(__name__)

LARGEST_NATS, MEAN_NATS = 2e-3, 2e-4
"""Allowed largest and mean difference in float32. Another order of summation causes about 1e-5."""
MEAN_NATS_BFLOAT16 = 0.1
"""Allowed mean difference in bfloat16. Other kernels cause about 1e-2."""
GRADIENT_SHARE = 1e-2
"""Allowed norm of the difference between gradients, as a share of the gradient's norm."""

_GROUPS = ((5, (3, 7)), (12, (1, 9, 4)), (1, (6,)), (40, (20, 24)))
"""Prompt length of each group, and response lengths of its siblings."""
_LOOK_BACK = ("sliding_window", "attention_chunk_size", "index_topk")
"""Attributes that limit how far back a layer attends."""
_SHORT_LOOK_BACK = 16
"""Value of these attributes during the check, so that the test batch's sequences exceed it."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference between two computations of the same tokens' log-probabilities, in nats."""

    largest: float
    mean: float

    @classmethod
    def between(cls, one_N: torch.Tensor, other_N: torch.Tensor) -> Difference:
        """Measure the difference. It is infinite if either side has values that are not finite."""
        differences_N = (one_N.detach().double() - other_N.detach().double()).abs().nan_to_num(torch.inf)
        return cls(float(differences_N.max()), float(differences_N.mean()))

    @property
    def is_rounding(self) -> bool:
        """Whether it is within float32 rounding."""
        return self.largest <= LARGEST_NATS and self.mean <= MEAN_NATS

    def __str__(self) -> str:
        return f"differ by up to {self.largest:.2g} nats (mean {self.mean:.2g})"


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a mode cannot be used."""

    reason: str
    nats: float = math.inf
    """The largest difference from the model's own log-probabilities."""


def checked_forward(model: Any, config: LearnerConfig) -> PackedForward:
    """Set up a model for training and return its forward pass. The model must be in evaluation mode, not sharded.

    Raises:
        Unusable: no mode gives the model's own log-probabilities.
    """
    named = f"model {config.model} ({type(model).__name__})"
    _check_parameters(model, named)
    failures: list[_Failure] = []
    with _short_look_back(model):
        native = model.config._attn_implementation
        check = _Check(model, config, named)
        if config.gradient_checkpointing:
            try:
                recompute_layers(model)
            except ValueError as error:
                raise Unusable(f"gradient_checkpointing: {named} cannot recompute its layers: {error}") from error
        for attention in dict.fromkeys((PACKED, native, "eager")):
            if not use_attention(model, attention):
                failures.append(_Failure(f"{attention} attention: the architecture does not support it"))
                continue
            for own_head in (False, True):
                mode = ForwardMode(attention, own_head)
                if failure := check.failure(mode):
                    failures.append(failure)
                    continue
                if not mode.packed:
                    logger.warning(
                        "%s: the learner computes %s, which is slower. Reason: %s", named, mode, failures[0].reason
                    )
                return check.forward(mode, check.dtype)
    raise Unusable(
        f"{named} cannot be trained: the learner's log-probabilities are not those of the model's own forward. "
        f"The closest of {len(failures)} modes: {min(failures, key=lambda each: each.nats).reason}. Allowed: "
        f"{LARGEST_NATS:g} nats, mean {MEAN_NATS:g}",
        remedy="Choose another model; `poise models check FOLDER` compares one before a run.",
    )


@torch.no_grad()
def logprobs_of_random_groups(forward: PackedForward) -> torch.Tensor:
    """Return a forward pass's log-probabilities of the test batch, [N]."""
    model = forward.model
    logprobs_N: torch.Tensor = forward(build_row(random_groups(model), model.device, forward.dtype), 1.0)[0]
    return logprobs_N


def check_adapters(forward: PackedForward, before_N: torch.Tensor, name: str) -> None:
    """Check that new adapters, which are zero, do not change the log-probabilities of the model called `name`.

    Raises:
        Unusable: they do, or the model's code fails with them.
    """
    try:
        difference = Difference.between(logprobs_of_random_groups(forward), before_N)
    except Exception as error:  # architectures fail in ways of their own
        reason = f"the forward pass fails with them: {type(error).__name__}: {error}"
    else:
        if difference.is_rounding:
            return
        reason = f"new adapters, whose output is zero, change the log-probabilities, which {difference}"
    raise Unusable(
        f"lora: model {name} ({type(forward.model).__name__}) cannot take these adapters: {reason}",
        remedy="Name other lora.target_modules, such as [q_proj, k_proj, v_proj, o_proj].",
    )


class _Check:
    """Compares modes with the model's own forward on the test batch."""

    def __init__(self, model: Any, config: LearnerConfig, named: str) -> None:
        self._model = model
        self._chunk_tokens = config.logprob_chunk_tokens
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self._groups = random_groups(model)
        use_attention(model, "eager")
        try:
            own_N = reference_logprobs(model, self._groups)
            self._gradient_Vd = self._gradient(own_N)
            self._own_N = own_N.detach()
            self._own_in_dtype_N = None
            if self.dtype != torch.float32:
                with torch.no_grad(), torch.autocast(model.device.type, self.dtype):
                    self._own_in_dtype_N = reference_logprobs(model, self._groups)
        except Exception as error:  # architectures fail in ways of their own
            raise Unusable(
                f"{named} cannot be trained: its own forward fails: {type(error).__name__}: {error}"
            ) from error
        if not self._own_N.isfinite().all():
            raise Unusable(
                f"{named} cannot be trained: its own forward gives log-probabilities that are not finite",
                remedy="Check its weights for NaN and infinity, and that they belong to its config.json.",
            )

    def forward(self, mode: ForwardMode, dtype: torch.dtype) -> PackedForward:
        """Return the learner's forward pass in a mode."""
        return PackedForward(self._model, mode, dtype, self._chunk_tokens)

    def failure(self, mode: ForwardMode) -> _Failure | None:
        """Return how a mode differs from the model's own forward; None if it agrees."""
        try:
            return self._failure(mode)
        except Exception as error:  # architectures fail in ways of their own
            return _Failure(f"{mode}: fails: {type(error).__name__}: {error}")

    def _failure(self, mode: ForwardMode) -> _Failure | None:
        device = self._model.device
        row = build_row(self._groups, device, torch.float32)
        logprobs_N, _ = self.forward(mode, torch.float32)(row, 1.0)
        difference = Difference.between(logprobs_N, self._own_N)
        if not difference.is_rounding:
            return _Failure(f"{mode}: log-probabilities {difference}", difference.largest)
        gradient_Vd = self._gradient(logprobs_N)
        share = float((gradient_Vd - self._gradient_Vd).norm() / self._gradient_Vd.norm().clamp_min(1e-12))
        if not share <= GRADIENT_SHARE:
            return _Failure(f"{mode}: gradients differ by {share:.2g} of their norm; allowed: {GRADIENT_SHARE:g}", 0.0)
        if self._own_in_dtype_N is not None:
            with torch.no_grad():
                logprobs_N, _ = self.forward(mode, self.dtype)(build_row(self._groups, device, self.dtype), 1.0)
            difference = Difference.between(logprobs_N, self._own_in_dtype_N)
            if not difference.mean <= MEAN_NATS_BFLOAT16:
                reason = f"log-probabilities in {self.dtype} {difference}; allowed: mean {MEAN_NATS_BFLOAT16:g}"
                return _Failure(f"{mode}: {reason}", difference.largest)
        return None

    def _gradient(self, logprobs_N: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the mean with respect to the input embeddings, which involves every layer."""
        gradient_Vd: torch.Tensor
        (gradient_Vd,) = torch.autograd.grad(logprobs_N.mean(), self._model.get_input_embeddings().weight)
        return gradient_Vd


def random_groups(model: Any) -> list[PromptGroup]:
    """Return the test batch: prompts and siblings of various lengths, of random tokens without special ones."""
    config = model.config.get_text_config()
    ordinary = _ordinary_tokens(config)
    generator = np.random.default_rng(0)
    longest = position_limit(model.config) or sys.maxsize
    groups = []
    for index, (num_prompt, responses) in enumerate(_GROUPS):
        prompt = generator.choice(ordinary, min(num_prompt, longest // 2))
        rollouts = []
        for rollout, num_response in enumerate(responses):
            tokens = generator.choice(ordinary, min(num_response, longest - prompt.size))
            rollouts.append(
                Rollout(
                    id=RolloutId("probe", 0, str(index), rollout),
                    prompt_token_ids=prompt,
                    token_ids=tokens,
                    logprobs=np.zeros(tokens.size, np.float32),
                    advantage=0.0,
                    version_spans=(VersionSpan(0, tokens.size, 0),),
                )
            )
        groups.append(PromptGroup(prompt, tuple(rollouts)))
    return groups


def _ordinary_tokens(config: Any) -> NDArray[np.int32]:
    """Return the token ids that are not special in a config; all ids if it names all of them."""
    every = np.arange(config.vocab_size, dtype=np.int32)
    special: set[Any] = set()
    for name, value in config.to_dict().items():
        if name.endswith("token_id"):
            special.update(value if isinstance(value, list | tuple) else (value,))
    ordinary = np.array([token for token in every if token not in special], np.int32)
    return ordinary if ordinary.size else every


def reference_logprobs(model: Any, groups: Sequence[PromptGroup]) -> torch.Tensor:
    """Return the log-probabilities of response tokens by the model's own `forward`, sequence by sequence, [N]."""
    parts = []
    for group in groups:
        for rollout in group.rollouts:
            ids = torch.tensor(np.concatenate((group.prompt_token_ids, rollout.token_ids)).astype(np.int64))
            num_prompt = int(group.prompt_token_ids.size)
            logits_TV = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0, num_prompt - 1 : -1]
            targets_T = ids[num_prompt:].to(model.device)
            parts.append(logits_TV.float().log_softmax(-1).gather(-1, targets_T[:, None])[:, 0])
    return torch.cat(parts)


def use_attention(model: Any, implementation: str) -> bool:
    """Switch a model to an `attn_implementation`; return False if the architecture cannot switch."""
    with contextlib.suppress(ValueError):
        model.set_attn_implementation(implementation)
    return bool(model.config._attn_implementation == implementation)


def _check_parameters(model: Any, named: str) -> None:
    others = [name for name, parameter in model.named_parameters() if not parameter.is_floating_point()]
    if others:
        raise Unusable(
            f"{named} cannot be trained: {len(others)} of its parameters are quantized, such as {others[0]}",
            remedy="Use the model from before quantization.",
        )
    if model.get_output_embeddings() is None:
        raise Unusable(f"{named} cannot be trained: it has no head over the vocabulary")


@contextlib.contextmanager
def _short_look_back(model: Any) -> Iterator[None]:
    """Shorten sliding windows and attention chunks, so that short sequences exceed them."""
    owners = {id(owner): owner for owner in (model.config, model.config.get_text_config(), *model.modules())}
    found = [
        (owner, name, value)
        for owner in owners.values()
        for name in _LOOK_BACK
        if isinstance(value := getattr(owner, name, None), int) and value > _SHORT_LOOK_BACK
    ]
    for owner, name, _ in found:
        setattr(owner, name, _SHORT_LOOK_BACK)
    try:
        yield
    finally:
        for owner, name, value in found:
            setattr(owner, name, value)
