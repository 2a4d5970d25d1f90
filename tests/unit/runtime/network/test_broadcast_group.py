from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from poise.runtime.network.broadcast_group import PIECE_BYTES, Rendezvous, backend_of, invite, join, piece_sizes


@pytest.mark.parametrize(
    ("num_bytes", "sizes"),
    [
        (0, []),
        (1, [1]),
        (PIECE_BYTES, [PIECE_BYTES]),
        (2 * PIECE_BYTES + 3, [PIECE_BYTES, PIECE_BYTES, 3]),
    ],
)
def test_payload_is_split_into_full_pieces_and_a_rest(num_bytes: int, sizes: list[int]) -> None:
    assert list(piece_sizes(num_bytes)) == sizes


def test_gpus_use_nccl_and_cpus_gloo() -> None:
    assert [backend_of(device) for device in ("cuda", "cuda:3", "cpu")] == ["nccl", "nccl", "gloo"]
    with pytest.raises(ValueError, match="nccl"):
        join(Rendezvous("nccl", b""), "cpu", 1.0)


def test_gloo_ignores_the_environments_interface(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    rendezvous, meet = invite("cpu", 60.0)
    received = torch.zeros(3, dtype=torch.uint8)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(lambda: meet().broadcast(torch.arange(3, dtype=torch.uint8)))
        join(rendezvous, "cpu", 60.0).broadcast(received)
        sending.result(60)
    assert received.tolist() == [0, 1, 2]
