"""What opens the push of a low-rank adapter."""

from __future__ import annotations

import struct

from poise_client.types import Adapter
from poise_proto.v1 import generation_pb2 as pb


def encode_adapter(adapter: Adapter) -> pb.WeightsAdapter:
    """Pack what an adapter is."""
    return pb.WeightsAdapter(rank=adapter.rank, alpha=adapter.alpha, base_digest=adapter.base_digest)


def decode_adapter(message: pb.WeightsAdapter) -> Adapter:
    """Unpack what an adapter is. Ranges are the servicer's to check."""
    return Adapter(message.rank, message.alpha, message.base_digest)


def adapter_seal(adapter: Adapter) -> bytes:
    """Return what the digest of a policy covers beside its tensors, when these are an adapter's."""
    return adapter.base_digest + struct.pack("<Id", adapter.rank, adapter.alpha)
