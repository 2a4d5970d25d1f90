"""A few thousand inputs; `make fuzz SECONDS=...` sends more of the same."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.fuzz.__main__ import fuzz, report, write_fuzz_run
from tests.fuzz.inputs import Input, make_input
from tests.fuzz.messages import RPCS
from tests.fuzz.mutation import mutated

from poise_proto.v1 import generation_pb2, learner_pb2, value_pb2

SEED = 20
TOKENS = dict.fromkeys(("generation", "value", "learner"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("has_token", "seconds"),
    [(False, 0.0), (True, 20.0)],  # one round; or several, which compare the memory with that after the first
)
def test_random_inputs_break_nothing(tmp_path: Path, has_token: bool, seconds: float) -> None:
    run_file = write_fuzz_run(tmp_path, has_token=has_token)

    campaign = fuzz(run_file, seed=SEED + has_token, start=0, seconds=seconds)

    print(report(campaign))
    assert [problem.what for problem in campaign.problems] == []
    assert campaign.num_inputs > 0


def test_every_rpc_is_fuzzed() -> None:
    described = {
        f"/{service.full_name}/{method.name}"
        for module in (generation_pb2, learner_pb2, value_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert described <= {rpc.method for rpc in RPCS}


def test_an_input_follows_from_seed_and_number() -> None:
    first, again = ([make_input(seed, n, 8, TOKENS) for n in range(300)] for seed in (3, 3))
    assert first == again
    assert first != [make_input(4, n, 8, TOKENS) for n in range(300)]
    assert {one.method for one in first} >= {rpc.method for rpc in RPCS if rpc.weight > 1}


def test_a_saved_input_is_read_again(tmp_path: Path) -> None:
    for number in range(50):
        one = make_input(5, number, 8, TOKENS)
        assert Input.load(one.save(tmp_path, "a problem")) == one


@pytest.mark.parametrize("rpc", RPCS, ids=lambda rpc: rpc.service + rpc.method.rpartition("/")[2])
def test_each_rpc_gets_many_different_messages(rpc) -> None:
    sent = {
        mutated(message, random.Random(seed)) for seed in range(400) for message in rpc.make(random.Random(seed), 8)
    }
    assert len(sent) > 20
