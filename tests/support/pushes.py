"""Messages of weight pushes, for tests that break them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from poise_client import WeightPush
from poise_client.types import WeightArray
from poise_proto.v1 import generation_pb2 as pb


def weight_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, WeightArray]:
    """Return float32 arrays as the client accepts them."""
    return {name: WeightArray(array, "float32") for name, array in arrays.items()}


def push_messages(
    arrays: Mapping[str, np.ndarray], version: int, *, lineage: str = "lineage", chunk_bytes: int = 2**20
) -> list[pb.UpdateWeightsRequest]:
    """Return the messages of a correct push."""
    return list(WeightPush.prepare(lineage, version, weight_arrays(arrays)).messages(chunk_bytes))
