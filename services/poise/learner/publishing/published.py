"""What is served: a version's weights, and their hashes. Never changed once made."""

from __future__ import annotations

from dataclasses import dataclass

from poise_client import combine_digests, hash_weights
from poise_client.types import Adapter, WeightArray


@dataclass(frozen=True)
class Published:
    """One version's weights, as they are to be served."""

    lineage_id: str
    policy_version: int
    weights: dict[str, WeightArray]
    sha256_by_name: dict[str, bytes]
    digest: bytes
    adapter: Adapter | None = None
    """What the weights are, if an adapter's rather than the model's."""


@dataclass(frozen=True)
class HashedWeights:
    """The weights of now, before they have a version."""

    weights: dict[str, WeightArray]
    sha256_by_name: dict[str, bytes]
    digest: bytes
    adapter: Adapter | None = None
    """As in `Published`."""

    @staticmethod
    def of(weights: dict[str, WeightArray], adapter: Adapter | None) -> HashedWeights:
        """Hash them."""
        hashes = hash_weights(weights)
        return HashedWeights(weights, hashes, combine_digests(hashes, adapter), adapter)

    def as_version(self, lineage_id: str, policy_version: int) -> Published:
        """Return them under their number."""
        return Published(lineage_id, policy_version, self.weights, self.sha256_by_name, self.digest, self.adapter)
