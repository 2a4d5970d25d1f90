"""Oversized requests are rejected before they are parsed, with a short message."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
from tests.unit.value.harness import always_probe

from poise.errors import Draining, InvalidRequest
from poise.runtime.rpc.validation import MAX_NAMED, Violations
from poise.value.messages import read_label, read_queries
from poise.value.servicer import ValueServicer
from poise.value.state import ValueState
from poise_client.codec import CodecError, from_tensor, to_tensor
from poise_proto.v1 import common_pb2
from poise_proto.v1 import value_pb2 as pb

MANY_AXES = common_pb2.Tensor(dtype=common_pb2.DTYPE_FLOAT32, shape=[2**32 - 1] * 500_000)
EMPTY = common_pb2.RolloutFeatures()


def group(**fields):
    return pb.GroupFeatures(group_id="g", **fields)


QUESTIONS = {
    "many groups": pb.EstimateBaselinesRequest(run_id="r", groups=[pb.GroupFeatures()] * 2_000_000),
    "many empty rollouts": pb.EstimateBaselinesRequest(run_id="r", groups=[group(rollouts=[EMPTY] * 1_000_000)]),
    "many rollouts in all": pb.EstimateBaselinesRequest(run_id="r", groups=[group(rollouts=[EMPTY] * 1000)] * 1000),
    "wrong groups": pb.EstimateBaselinesRequest(run_id="r", groups=[group(domain="\0")] * 4000),
    "many axes": pb.EstimateBaselinesRequest(
        run_id="r", groups=[group(rollouts=[common_pb2.RolloutFeatures(prompt_hidden=MANY_AXES)])]
    ),
    "axes of rewards": pb.EstimateBaselinesRequest(run_id="r", groups=[group(rewards=MANY_AXES)]),
    "long run": pb.EstimateBaselinesRequest(run_id="r" * 4_000_000, groups=[group()]),
}


@pytest.fixture
def servicer(config):
    service = ValueServicer(config())
    service.open(SimpleNamespace(state=ValueState(config())))  # no request gets this far
    return service


@pytest.mark.parametrize("how", QUESTIONS)
async def test_an_oversized_request_is_rejected(servicer, how):
    with pytest.raises(InvalidRequest) as caught:
        await servicer.EstimateBaselines(QUESTIONS[how], None)
    assert len(caught.value.violations) <= MAX_NAMED + 1
    assert all(len(violation.description) < 300 for violation in caught.value.violations)


async def test_the_event_loop_keeps_running_during_parsing(servicer):
    request = pb.EstimateBaselinesRequest(run_id="r", groups=[group(rollouts=[EMPTY] * 16)] * 4000)
    asking = asyncio.create_task(servicer.EstimateBaselines(request, None))
    await asyncio.sleep(0)
    assert not asking.done()
    with pytest.raises(InvalidRequest):
        await asking


async def test_a_request_parsed_while_the_service_closes_is_rejected(servicer):
    state = to_tensor(np.zeros(2, np.float32))
    rollouts = [common_pb2.RolloutFeatures(prompt_hidden=state, response_hidden=state)]
    request = pb.EstimateBaselinesRequest(run_id="r", groups=[group(rollouts=rollouts)])
    asking = asyncio.create_task(servicer.EstimateBaselines(request, None))
    await asyncio.sleep(0)
    servicer.close()
    with pytest.raises(Draining):
        await asking


@pytest.mark.parametrize("count", [1, 1025])
def test_a_label_has_a_bounded_number_of_rollouts(count):
    wrong = Violations()
    label = pb.LabelledGroup(schema_version=2, run_id="r", group_id="g", num_rollouts=count, rollouts=[EMPTY] * count)
    assert read_label(label, "group", wrong, always_probe) is None
    assert f"has {count} rollouts" in str(wrong.error())


def test_a_long_list_of_widths_is_shortened():
    rollouts = [
        common_pb2.RolloutFeatures(prompt_hidden=state, response_hidden=state)
        for state in (to_tensor(np.zeros(width, np.float32)) for width in range(1, 500))
    ]
    wrong = Violations()
    read_queries([group(rollouts=rollouts)], wrong, always_probe)
    assert len(str(wrong.error())) < 400


@pytest.mark.parametrize("shape", [[2] * 9, [2**32 - 1] * 1000, [0] * 500_000])
def test_the_number_of_tensor_axes_is_checked_first(shape):
    with pytest.raises(CodecError, match=f"has {len(shape)} axes; required: 1"):
        from_tensor(common_pb2.Tensor(dtype=common_pb2.DTYPE_FLOAT32, shape=shape))
