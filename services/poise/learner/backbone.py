"""The model that training starts from, and its states of a packed row: common to policy, reference and critic.

Shapes: L tokens of the row, N response tokens of it, d the model's width.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from poise.errors import Unusable
from poise.learner import attention
from poise.learner.config import LearnerConfig
from poise.learner.packing import PackedRow


def load_model(config: LearnerConfig) -> Any:
    """Load the model that training starts from. Raises `Unusable`."""
    attention.register()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            config.model, dtype=torch.float32, attn_implementation=attention.PACKED
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise Unusable(f"model {config.model} cannot be loaded: {error}") from error
    _refuse_unless_all_attend_to_all(model.config, config.model)
    return model


def predictor_states(decoder: Any, row: PackedRow, dtype: torch.dtype) -> torch.Tensor:
    """Return the states before each response token of a row, [N, d]: those that predict it. Computed in `dtype`."""
    with torch.autocast(row.token_ids_1L.device.type, dtype, enabled=dtype != torch.float32):
        states_1Ld: torch.Tensor = decoder(
            input_ids=row.token_ids_1L,
            position_ids=row.positions_1L,
            attention_spans=row.spans,
            use_cache=False,
        ).last_hidden_state
    return states_1Ld[0].index_select(0, row.predictors_N)


def _refuse_unless_all_attend_to_all(config: Any, model: str) -> None:
    """Rows of siblings replace the model's own mask: one that looks back over a window, or recurs, would be wrong."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds and getattr(config, "sliding_window", None) is not None:
        kinds = {"sliding_attention"}
    if others := sorted(kinds - {"full_attention"}):
        raise Unusable(
            f"model {model} has layers of {', '.join(others)}; the learner trains models of full attention alone"
        )
