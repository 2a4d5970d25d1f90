from __future__ import annotations

import pytest

from poise.runtime.collective import PIECE_BYTES, Rendezvous, backend_of, join, piece_sizes


@pytest.mark.parametrize(
    ("num_bytes", "sizes"),
    [
        (0, []),
        (1, [1]),
        (PIECE_BYTES, [PIECE_BYTES]),
        (2 * PIECE_BYTES + 3, [PIECE_BYTES, PIECE_BYTES, 3]),
    ],
)
def test_a_part_goes_in_full_pieces_and_what_is_left(num_bytes: int, sizes: list[int]) -> None:
    assert list(piece_sizes(num_bytes)) == sizes


def test_gpus_meet_by_nccl_and_cpus_by_gloo() -> None:
    assert [backend_of(device) for device in ("cuda", "cuda:3", "cpu")] == ["nccl", "nccl", "gloo"]
    with pytest.raises(ValueError, match="nccl"):
        join(Rendezvous("nccl", b""), "cpu", 1.0)
