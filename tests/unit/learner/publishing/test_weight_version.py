from __future__ import annotations

import dataclasses
import gc
import weakref

import numpy as np
import pytest

from poise.errors import BackendDown
from poise.learner.publishing.transports import SharedTransport, Transport
from poise.learner.publishing.weight_version import VersionPushes, WeightVersion
from poise_client import combine_digests, hash_weights
from poise_client.types import Adapter, Policy, WeightArray


def published(number: int, dtype: str = "bfloat16") -> WeightVersion:
    """A version that differs from the one before in three elements."""
    array = np.arange(1000, dtype=np.uint16 if dtype == "bfloat16" else np.float32)
    array[: 3 * number] += 1
    weights = {"a": WeightArray(array, dtype)}
    hashes = hash_weights(weights)
    return WeightVersion("lineage", number, weights, hashes, combine_digests(hashes))


def serving(version: WeightVersion, *, keeps_base: bool = True) -> Policy:
    return Policy(
        "i", version.lineage_id, version.policy_version, version.digest, True, "", "torch", "m", 1, 1, 1, 0, keeps_base
    )


def offered(
    version: WeightVersion, before: VersionPushes | None = None, *, deltas: bool = True, transport=None
) -> VersionPushes:
    return VersionPushes(version, before, transport or Transport(), deltas=deltas)


async def test_delta_is_for_replicas_that_keep_the_version_before():
    first, second = published(1), published(2)
    offer = offered(second, offered(first))
    delta = await offer.delta_for(serving(first))
    assert delta is not None
    assert [tensor.num_changed for tensor in delta.manifest.tensors] == [3]
    assert delta.manifest.digest == second.digest
    for other in (serving(first, keeps_base=False), serving(published(0)), serving(second)):
        assert await offer.delta_for(other) is None
    assert not (await offer.full()).is_delta


async def test_adapters_are_described_and_sent_whole():
    adapter = Adapter(4, 8.0, b"b" * 32)
    versions = [dataclasses.replace(published(number), adapter=adapter) for number in (1, 2)]
    offer = offered(versions[1], offered(versions[0]))
    assert await offer.delta_for(serving(versions[0])) is None
    manifest = (await offer.full()).manifest
    assert (manifest.adapter.rank, manifest.adapter.alpha, manifest.adapter.base_digest) == (4, 8.0, b"b" * 32)
    assert not manifest.keep_as_base


async def test_first_version_has_no_delta_and_is_kept_as_base():
    offer = offered(published(1))
    assert await offer.delta_for(serving(published(0))) is None
    assert (await offer.full()).manifest.keep_as_base


@pytest.mark.parametrize(("deltas", "dtype"), [(False, "bfloat16"), (True, "float32")])
async def test_nothing_is_kept_without_deltas(deltas, dtype):
    first, second = published(1, dtype), published(2, dtype)
    offer = offered(second, offered(first, deltas=deltas), deltas=deltas)
    assert not (await offer.full()).manifest.keep_as_base
    assert await offer.delta_for(serving(first)) is None


async def test_each_push_is_made_once_for_all():
    offer = offered(published(2), offered(published(1)))
    assert await offer.full() is await offer.full()
    assert await offer.delta_for(serving(published(1))) is await offer.delta_for(serving(published(1)))


async def test_known_hashes_are_not_computed_again():
    version = published(1)
    hashes = {"a": b"x" * 32}
    offer = offered(WeightVersion("l", 1, version.weights, hashes, combine_digests(hashes)))
    assert (await offer.full()).manifest.tensors[0].sha256 == b"x" * 32


async def test_previous_weights_are_freed_once_compared():
    first = published(1)
    array = weakref.ref(first.weights["a"].array)
    before = offered(first)
    offer = offered(published(2), before)
    policy = serving(first)
    assert await offer.delta_for(policy) is not None
    await before.close()
    del first, before
    gc.collect()
    assert array() is None


async def test_files_are_written_on_demand_and_removed_on_close(tmp_path):
    transport = SharedTransport(tmp_path)
    before = offered(published(1), transport=transport)
    offer = offered(published(2), before, transport=transport)
    assert list(tmp_path.rglob("*.safetensors")) == []
    whole, delta = await offer.full(), await offer.delta_for(serving(published(1)))
    assert {str(path) for path in tmp_path.rglob("*.safetensors")} == {whole.manifest.file, delta.manifest.file}
    await before.close()
    await offer.close()
    assert list(tmp_path.rglob("*.safetensors")) == []
    transport.close()


async def test_write_errors_are_raised_to_every_caller(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    offer = offered(published(1), transport=SharedTransport(tmp_path / "file"))
    for _ in range(2):
        with pytest.raises(BackendDown):
            await offer.full()
    await offer.close()


async def test_invalid_weights_fail_only_their_own_pushes():
    broken = offered(WeightVersion("l", 1, {"a": object()}, {}, b"x"))
    with pytest.raises(Exception, match="object"):
        await broken.full()
    offer = offered(published(2), broken)
    assert await offer.delta_for(serving(published(1))) is None
    assert (await offer.full()).manifest.policy_version == 2
