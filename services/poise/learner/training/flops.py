"""FLOPs of a training step, and the peak FLOP/s of devices.

The counts leave out recomputed activations and softmaxes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

_PEAKS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 9.89e14,
    "H200": 9.89e14,
    "H100 PCIe": 7.56e14,
    "H100 NVL": 8.35e14,
    "H100": 9.89e14,
    "H20": 1.48e14,
    "A100": 3.12e14,
    "A30": 1.65e14,
    "A10": 1.25e14,
    "L40S": 3.62e14,
    "L40": 1.81e14,
    "L4": 1.21e14,
    "RTX 4090": 1.65e14,
    "RTX 3090": 7.1e13,
}
"""Dense bfloat16 FLOP/s from the data sheets, by a part of the device's name. The first match is used."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """FLOPs of a forward and a backward pass, per unit."""

    decoder_flops: int
    """Matrix products with the decoder's weights, per token."""
    head_flops: int
    """Matrix products with the head's weights, per predicted token."""
    attended_flops: int
    """Attention, per pair of query and key."""

    def training_flops(self, num_tokens: int, num_targets: int, num_attended: int) -> int:
        """Return the FLOPs for these numbers of tokens, predicted tokens and attended pairs."""
        return num_tokens * self.decoder_flops + num_targets * self.head_flops + num_attended * self.attended_flops


def model_size(model: Any) -> ModelSize | None:
    """Measure a transformers causal language model; None if experts or recurrence make the count unknown."""
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    if not isinstance(getattr(config, "num_attention_heads", None), int):
        return None
    head = model.get_output_embeddings().weight
    tables = {id(head), id(model.get_input_embeddings().weight)}
    weights = [weight for weight in model.parameters() if weight.dim() == 2 and id(weight) not in tables]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelSize(
        decoder_flops=sum(_product_flops(weight) for weight in weights),
        head_flops=_product_flops(head),
        # Scores and weighted values: 2 FLOPs a product each, and twice that in the backward pass.
        attended_flops=12 * head_dim * config.num_attention_heads * config.num_hidden_layers,
    )


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak FLOP/s of a device; None if unknown."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def _product_flops(weight: torch.Tensor) -> int:
    """Return 2 FLOPs an element for the output, the input's gradient and, if trained, the weight's gradient."""
    return (6 if weight.requires_grad else 4) * weight.numel()
