from __future__ import annotations

import dataclasses
import gc
import weakref

import numpy as np
import pytest

from poise.errors import BackendDown
from poise.learner.publishing.published import Published
from poise.learner.publishing.transports import GrpcTransport, SharedTransport
from poise.learner.publishing.weight_version import Offer
from poise_client import combine_digests, hash_weights
from poise_client.types import Adapter, Policy, WeightArray


def published(number: int, dtype: str = "bfloat16") -> Published:
    """A version of which three elements differ from the one before."""
    array = np.arange(1000, dtype=np.uint16 if dtype == "bfloat16" else np.float32)
    array[: 3 * number] += 1
    weights = {"a": WeightArray(array, dtype)}
    hashes = hash_weights(weights)
    return Published("lineage", number, weights, hashes, combine_digests(hashes))


def serving(version: Published, *, keeps_base: bool = True) -> Policy:
    return Policy(
        "i", version.lineage_id, version.policy_version, version.digest, True, "", "torch", "m", 1, 1, 1, 0, keeps_base
    )


def offered(version: Published, before: Offer | None = None, *, deltas: bool = True, transport=None) -> Offer:
    return Offer(version, before, transport or GrpcTransport(), deltas=deltas)


async def test_a_delta_is_for_who_keeps_the_version_before():
    first, second = published(1), published(2)
    offer = offered(second, offered(first))
    delta = await offer.delta_for(serving(first))
    assert delta is not None
    assert [tensor.num_changed for tensor in delta.manifest.tensors] == [3]
    assert delta.manifest.digest == second.digest
    for other in (serving(first, keeps_base=False), serving(published(0)), serving(second)):
        assert await offer.delta_for(other) is None
    assert not (await offer.whole()).is_delta


async def test_adapters_say_what_they_are_and_travel_whole():
    adapter = Adapter(4, 8.0, b"b" * 32)
    versions = [dataclasses.replace(published(number), adapter=adapter) for number in (1, 2)]
    offer = offered(versions[1], offered(versions[0]))
    assert await offer.delta_for(serving(versions[0])) is None
    begin = (await offer.whole()).manifest
    assert (begin.adapter.rank, begin.adapter.alpha, begin.adapter.base_digest) == (4, 8.0, b"b" * 32)
    assert not begin.keep_as_base


async def test_the_first_offer_has_no_delta_and_asks_for_keeping_its_weights():
    offer = offered(published(1))
    assert await offer.delta_for(serving(published(0))) is None
    assert (await offer.whole()).manifest.keep_as_base


@pytest.mark.parametrize(("deltas", "dtype"), [(False, "bfloat16"), (True, "float32")])
async def test_nothing_is_kept_where_no_delta_would_come(deltas, dtype):
    first, second = published(1, dtype), published(2, dtype)
    offer = offered(second, offered(first, deltas=deltas), deltas=deltas)
    assert not (await offer.whole()).manifest.keep_as_base
    assert await offer.delta_for(serving(first)) is None


async def test_each_push_is_made_once_for_all():
    offer = offered(published(2), offered(published(1)))
    assert await offer.whole() is await offer.whole()
    assert await offer.delta_for(serving(published(1))) is await offer.delta_for(serving(published(1)))


async def test_the_hashes_that_are_known_are_not_taken_again():
    version = published(1)
    hashes = {"a": b"x" * 32}
    offer = offered(Published("l", 1, version.weights, hashes, combine_digests(hashes)))
    assert (await offer.whole()).manifest.tensors[0].sha256 == b"x" * 32


async def test_the_weights_before_are_let_go_once_compared():
    first = published(1)
    array = weakref.ref(first.weights["a"].array)
    before = offered(first)
    offer = offered(published(2), before)
    policy = serving(first)
    assert await offer.delta_for(policy) is not None
    await before.withdraw()
    del first, before
    gc.collect()
    assert array() is None


async def test_files_are_written_only_when_wanted_and_removed_when_withdrawn(tmp_path):
    transport = SharedTransport(tmp_path)
    before = offered(published(1), transport=transport)
    offer = offered(published(2), before, transport=transport)
    assert list(tmp_path.rglob("*.safetensors")) == []
    whole, delta = await offer.whole(), await offer.delta_for(serving(published(1)))
    assert {str(path) for path in tmp_path.rglob("*.safetensors")} == {whole.manifest.file, delta.manifest.file}
    await before.withdraw()
    await offer.withdraw()
    assert list(tmp_path.rglob("*.safetensors")) == []
    transport.close()


async def test_what_cannot_be_written_is_told_to_each_who_wants_it(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    offer = offered(published(1), transport=SharedTransport(tmp_path / "file"))
    for _ in range(2):
        with pytest.raises(BackendDown):
            await offer.whole()
    await offer.withdraw()


async def test_weights_that_make_no_sense_are_an_error_of_their_pushes_alone():
    broken = offered(Published("l", 1, {"a": object()}, {}, b"x"))
    with pytest.raises(Exception, match="object"):
        await broken.whole()
    offer = offered(published(2), broken)
    assert await offer.delta_for(serving(published(1))) is None
    assert (await offer.whole()).manifest.policy_version == 2
