"""The head of every values file lists what its manifests request."""

from __future__ import annotations

import re

import pytest
from tests.chart.needs import needs_of
from tests.chart.rendering import VALUES, Manifest, merged, render, values_of
from tests.chart.test_images import DEPLOY

PARAMETERS, LAYERS, WIDTH, VOCABULARY = 4.02e9, 36, 2560, 151_936
"""Sizes of Qwen3-4B."""
LAYER_PARAMETERS = 100.9e6
LAYER_BYTES_PER_TOKEN = 170.8e3
"""Bytes that autograd saves for one layer in bfloat16, measured on a CPU with torch's hooks for saved tensors."""
OTHER_GB = 5.0
"""Bytes for CUDA, NCCL and fragmentation."""

GPU_GB = {"qwen3-4b-two-gpus": 141.0, "cluster": 80.0}


def head_of(name: str) -> dict[str, str]:
    """Return the lines of "What it needs", by their first word."""
    comment = VALUES[name].read_text().partition("\n\n")[0].replace("\n#            ", " ")
    return dict(re.findall(r"^#   (GPUs|Driver|CPU|Memory|Disk) +(.+)$", comment, re.MULTILINE))


def first_number(text: str) -> float:
    match = re.search(r"\d+(\.\d+)?", text)
    return float(match[0]) if match else 0.0


@pytest.mark.parametrize("name", VALUES)
def test_head_of_a_values_file_lists_what_it_needs(name: str) -> None:
    head, needs = head_of(name), needs_of(render(values_of(name)))
    assert head.keys() == {"GPUs", "Driver", "CPU", "Memory", "Disk"}
    assert first_number(head["GPUs"]) == needs.gpus
    assert first_number(head["CPU"]) == needs.cpus
    assert first_number(head["Memory"]) == needs.memory_gib
    assert f"at most {needs.limit_gib:g} GiB" in head["Memory"]
    assert first_number(head["Disk"]) == needs.disk_gib
    cuda = re.search(r"cuda(\d+\.\d+)", (DEPLOY / "learner.Dockerfile").read_text())
    assert cuda is not None
    assert (f"CUDA {cuda[1]}" in head["Driver"]) == (needs.gpus > 0)


def budget_gb(config: Manifest, num_gpus: int, longest_tokens: int) -> float:
    """Return the bytes on a GPU of the learner in a step, in bfloat16 with float32 weights."""
    state = 16 * PARAMETERS / num_gpus
    # Several GPUs gather the embeddings and two layers at a time.
    copies = 2 * PARAMETERS if num_gpus == 1 else 6 * (VOCABULARY * WIDTH + 2 * LAYER_PARAMETERS)
    row = max(longest_tokens, config.get("micro_batch_tokens", 4096))
    inputs, of_layer = 2 * WIDTH * row, LAYER_BYTES_PER_TOKEN * row
    activations = LAYERS * inputs + of_layer if config.get("gradient_checkpointing") else LAYERS * of_layer
    logits = 3 * 4 * VOCABULARY * config.get("logprob_chunk_tokens", 256)
    return (state + copies + activations + logits) / 1e9 + OTHER_GB


@pytest.mark.parametrize("name", GPU_GB)
def test_a_step_fits_the_gpu_of_the_values_file(name: str) -> None:
    values = values_of(name)
    config = render(values).config("learner")
    longest = values["generation"]["config"]["max_model_len"]
    num_gpus = values["learner"]["nodes"] * values["learner"]["gpusPerNode"]
    assert f"{GPU_GB[name]:g} GB or more" in head_of(name)["GPUs"]
    assert budget_gb(config, num_gpus, longest) < 0.8 * GPU_GB[name]
    # The allocator reserves about a tenth more than it uses.
    without = budget_gb(merged(config, {"gradient_checkpointing": False}), num_gpus, longest)
    assert 1.1 * without > GPU_GB[name]


@pytest.mark.parametrize("name", GPU_GB)
def test_volume_and_shared_memory_hold_the_model(name: str) -> None:
    values = values_of(name)
    claim = render(values).one("PersistentVolumeClaim", "run-poise-learner")
    size_gib = first_number(claim["spec"]["resources"]["requests"]["storage"])
    # Weights and moments of two checkpoints and of one that is being written, and an export.
    assert size_gib * 2**30 > (3 * 12 + 4) * PARAMETERS
    for role in ("generation", "learner"):
        assert first_number(values[role]["sharedMemory"]) * 2**30 >= 2 * 2 * PARAMETERS
        limit = first_number(values[role]["resources"]["limits"]["memory"])
        assert first_number(values[role]["sharedMemory"]) < limit / 2
