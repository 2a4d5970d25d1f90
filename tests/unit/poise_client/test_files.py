import contextlib

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.support.groups import make_group

from poise_client import codec
from poise_client.codec import CodecError
from poise_client.types import Batch, Features, Rollout, RolloutId

IDS, LOGPROBS = np.arange(3, dtype=np.int32), np.array([-0.5, -1, 0], np.float32)
BATCH = Batch(
    "run",
    "step-1",
    1,
    tuple(
        Rollout(RolloutId("run", 1, "g", i), IDS, IDS + i, LOGPROBS, advantage=0.25 * i, reward=reward)
        for i, reward in enumerate((None, 0.0))
    ),
    temperature=0.5,
)
STATE = Features(LOGPROBS, LOGPROBS)
LABELS = [make_group(name, [STATE, STATE], [0, 1], domain="math", step=1) for name in "gh"]


def test_a_batch_survives_dump_and_load():
    back = codec.load_batch(codec.dump_batch(BATCH))
    assert (back.run_id, back.batch_id, back.step, back.temperature) == ("run", "step-1", 1, 0.5)
    assert [rollout.id for rollout in back.rollouts] == [rollout.id for rollout in BATCH.rollouts]
    assert [rollout.token_ids.tolist() for rollout in back.rollouts] == [[0, 1, 2], [1, 2, 3]]
    assert [rollout.advantage for rollout in back.rollouts] == [0, 0.25]
    assert [rollout.reward for rollout in back.rollouts] == [None, 0.0]  # no reward is not a reward of 0
    assert codec.dump_batch(back) == codec.dump_batch(BATCH)


def test_labels_survive_dump_and_load():
    back = codec.load_labels(codec.dump_labels(LABELS))
    assert [group.group_id for group in back] == ["g", "h"]
    assert codec.dump_labels(back) == codec.dump_labels(LABELS)
    assert codec.load_labels(b"") == []


def test_a_truncated_batch_is_rejected():
    content = codec.dump_batch(BATCH)
    for length in range(len(content)):
        with pytest.raises(CodecError):
            codec.load_batch(content[:length])


def test_a_malformed_label_is_rejected():
    content = codec.dump_labels(LABELS)
    half = len(content) // 2  # the two are of one length
    for length in {*range(1, len(content))} - {half}:
        with pytest.raises(CodecError):
            codec.load_labels(content[:length])


@given(st.binary(max_size=64))
@example(b"\x80" * 9 + b"\x01")  # a length beyond the range of an index
def test_arbitrary_bytes_raise_only_codec_errors(content):
    for load in (codec.load_batch, codec.load_labels):
        with contextlib.suppress(CodecError):  # a batch of no rollouts is one too
            load(content)
