import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from poise_client.codec import CodecError, apply_delta, make_delta, max_block_bytes

pairs = st.sampled_from([2, 4, 8]).flatmap(
    lambda size: st.integers(0, 300).flatmap(
        lambda n: st.tuples(
            *[
                hnp.arrays(np.dtype(f"<u{size}"), n, elements=st.integers(0, 2 ** (8 * size) - 1) | st.just(7))
                for _ in range(2)
            ]
        )
    )
)


def rebuilt(base, block, num_changed):
    target = bytearray(base.tobytes())
    apply_delta(target, block, num_changed, base.itemsize, "block")
    return np.frombuffer(target, base.dtype)


@given(pairs)
def test_a_delta_restores_every_bit(pair):
    base, new = pair
    num_changed, block = make_delta(base.data, new.data, base.itemsize)
    assert num_changed == (base != new).sum()
    assert len(block) <= max_block_bytes(num_changed, base.itemsize)
    np.testing.assert_array_equal(rebuilt(base, block, num_changed), new)


def test_a_block_follows_the_documented_format():
    base, new = np.array([5, 5, 5, 5, 5], "<u2"), np.array([5, 6, 5, 5, 3], "<u2")
    num_changed, block = make_delta(base.data, new.data, 2)
    gaps, steps = np.array([2, 3], "<u4"), np.array([2, 3], "<u2")  # +1 is 2, -2 is 3
    content = b"".join(bytes(x.tobytes()[byte :: x.itemsize]) for x in (gaps, steps) for byte in range(x.itemsize))
    assert (num_changed, zlib.decompress(block)) == (2, content)


def test_incompressible_blocks_stay_within_the_bound():
    random = np.random.default_rng(0)
    base, new = (random.integers(0, 2**64, 50_000, np.uint64) for _ in range(2))
    num_changed, block = make_delta(base.data, new.data, 8)
    assert len(block) <= max_block_bytes(num_changed, 8)


def test_no_change_gives_an_empty_block():
    base = np.arange(9, dtype="<u2")
    assert make_delta(base.data, base.copy().data, 2) == (0, b"")
    np.testing.assert_array_equal(rebuilt(base, b"", 0), base)


def test_few_small_changes_take_few_bytes():
    random = np.random.default_rng(0)
    base = random.integers(0, 2**16, 100_000, np.uint16)
    new = base + (random.random(base.size) < 0.01).astype(np.uint16)
    assert len(make_delta(base.data, new.data, 2)[1]) < 0.01 * base.nbytes


BASE = np.arange(8, dtype="<u2")


def block_of(gaps, steps=None):
    steps = np.array([2] * len(gaps) if steps is None else steps, "<u2")
    gaps = np.array(gaps, "<u4")
    planes = [x.view(np.uint8).reshape(-1, x.itemsize).T.tobytes() for x in (gaps, steps)]
    return zlib.compress(b"".join(planes))


@pytest.mark.parametrize(
    ("block", "num_changed"),
    [
        pytest.param(b"", 1, id="nothing at all"),
        pytest.param(b"x", 0, id="something for no change"),
        pytest.param(b"no zlib stream", 2, id="no zlib"),
        pytest.param(block_of([1, 1])[:-3], 2, id="cut short"),
        pytest.param(block_of([1, 1]) + b"x", 2, id="more after it"),
        pytest.param(block_of([1, 1]), 1, id="more than announced"),
        pytest.param(block_of([1, 1]), 3, id="less than announced"),
        pytest.param(block_of([1, 0]), 2, id="a position twice"),
        pytest.param(block_of([0, 1]), 2, id="before the first"),
        pytest.param(block_of([9]), 1, id="beyond the last"),
        pytest.param(block_of([2**32 - 1] * 3), 3, id="far beyond"),
        pytest.param(zlib.compress(bytes(10**7)), 2, id="a bomb"),
    ],
)
def test_a_malformed_delta_is_rejected_by_field(block, num_changed):
    with pytest.raises(CodecError) as caught:
        rebuilt(BASE, block, num_changed)
    assert caught.value.field == "block"


def test_positions_may_be_first_and_last():
    np.testing.assert_array_equal(rebuilt(BASE, block_of([1, 7]), 2), [1, 1, 2, 3, 4, 5, 6, 8])
