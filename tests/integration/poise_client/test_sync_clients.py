"""The blocking clients run in threads here: the server needs the test's own loop."""

import asyncio
import signal
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from poise_client import GenerationClient, LearnerClient, RetryPolicy, ValueClient, errors
from poise_client.types import Batch, Prompt, PromptFeatures, Rollout, RolloutId, WeightArray

QUICK = RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.02)
PROMPTS = [Prompt(name, "?") for name in "abcd"]


@pytest.fixture
async def generation(target):
    client = GenerationClient(target, retries=QUICK, timeout_s=20)
    yield client
    await asyncio.to_thread(client.close)


@pytest.fixture
async def value(target):
    client = ValueClient(target, retries=QUICK, timeout_s=20)
    yield client
    await asyncio.to_thread(client.close)


async def test_the_calls_answer_as_the_async_ones_do(target, generation, value):
    ids = np.arange(2, dtype=np.int32)
    rollout = Rollout(RolloutId("run", 0, "g", 0), ids, ids, np.zeros(2, np.float32), advantage=0.5)
    weights = {"w": WeightArray(np.ones(3, np.float32), "float32")}

    def calls():
        with LearnerClient(target) as learner:
            assert learner.get_status().state == "idle"
            assert learner.submit_advantages(Batch("run", "b", 0, (rollout,))).policy_version == 9
            assert learner.export_model("final").policy_version == 9
        assert generation.get_policy().policy_version == 3
        assert generation.update_weights(lineage_id="l", policy_version=5, weights=weights).policy_version == 5
        assert value.get_probe().num_pending == 4
        assert [prompt.group_id for prompt in generation.encode_prompts(PROMPTS)] == list("abcd")
        assert [check.num_tokens for check in generation.check_prompts(PROMPTS)] == [len(p.content) for p in PROMPTS]
        assert value.score_prompts([PromptFeatures("p", "d", np.ones(2, np.float32))])[0].value == 0.25
        assert value.estimate_baselines("run", 0, []) == []
        assert value.publish_labels([]) == 0

    await asyncio.to_thread(calls)


async def test_a_stream_is_a_plain_iterator_that_survives_a_break(generation, generation_service, unavailable):
    generation_service.script = [generation_service.stream("b", then=unavailable)]
    groups = await asyncio.to_thread(
        lambda: [group.group_id for group in generation.stream_trajectories("run", 0, PROMPTS, num_rollouts=1)]
    )
    assert groups == ["b", "a", "c", "d"]


async def test_errors_are_raised_where_the_call_was_made(value, value_service, unavailable):
    value_service.script = [unavailable] * 100_000
    with pytest.raises((errors.UnavailableError, errors.DeadlineExceededError)) as caught:
        await asyncio.to_thread(value.get_probe, timeout_s=3)
    assert caught.value.attempts > 1


async def test_closing_a_stream_cancels_it_in_the_service_and_ends_it(generation, generation_service):
    generation_service.script = [generation_service.stream("a", then=generation_service.hang)]

    def consume():
        groups = generation.stream_trajectories("run", 0, PROMPTS, num_rollouts=1)
        assert next(groups).group_id == "a"
        groups.close()
        groups.close()
        assert list(groups) == []
        return groups

    _kept_alive = await asyncio.to_thread(consume)
    await asyncio.wait_for(generation_service.cancelled.wait(), 60)


async def test_leaving_a_for_early_cancels_the_stream_in_the_service(generation, generation_service):
    generation_service.script = [generation_service.stream("a", then=generation_service.hang)]

    def consume():
        for _ in generation.stream_trajectories("run", 0, PROMPTS, num_rollouts=1):
            break

    await asyncio.to_thread(consume)
    await asyncio.wait_for(generation_service.cancelled.wait(), 60)


async def test_a_stream_closed_by_another_thread_ends(generation, generation_service):
    generation_service.script = [generation_service.stream("a", then=generation_service.hang)]
    groups = generation.stream_trajectories("run", 0, PROMPTS, num_rollouts=1)
    consumer = asyncio.create_task(asyncio.to_thread(list, groups))
    await asyncio.wait_for(generation_service.started.wait(), 60)
    await asyncio.to_thread(groups.close)
    assert len(await asyncio.wait_for(consumer, 60)) <= 1
    await asyncio.wait_for(generation_service.cancelled.wait(), 60)


async def test_several_threads_share_a_client_and_a_stream(generation, value):
    prompts = [Prompt(f"g{i}", "?") for i in range(40)]
    groups = generation.stream_trajectories("run", 0, prompts, num_rollouts=1)

    def work(_):
        return [(group.group_id, value.get_probe().num_pending) for group in groups]

    def all_work():
        with ThreadPoolExecutor(4) as pool:
            return [item for part in pool.map(work, range(4)) for item in part]

    items = await asyncio.to_thread(all_work)
    assert sorted(items) == sorted((prompt.group_id, 4) for prompt in prompts)


async def test_closing_the_client_ends_calls_of_other_threads(value, value_service):
    value_service.script = [value_service.hang]
    call = asyncio.create_task(asyncio.to_thread(value.get_probe))
    await asyncio.wait_for(value_service.started.wait(), 60)
    await asyncio.to_thread(value.close)
    with pytest.raises(errors.UnavailableError, match="closed during the call"):
        await asyncio.wait_for(call, 60)
    await asyncio.wait_for(value_service.cancelled.wait(), 60)
    await asyncio.to_thread(value.close)


async def test_closing_the_client_ends_calls_between_attempts(target, generation, unavailable, value_service):
    await asyncio.to_thread(generation.get_policy)  # the loop goes on: another client uses it
    value_service.script = [unavailable] * 2
    client = ValueClient(target, retries=RetryPolicy(initial_backoff_s=60, max_backoff_s=60), timeout_s=600)
    call = asyncio.create_task(asyncio.to_thread(client.get_probe))
    await asyncio.wait_for(value_service.started.wait(), 60)
    await asyncio.to_thread(client.close)
    with pytest.raises(errors.UnavailableError, match="closed during the call"):
        await asyncio.wait_for(call, 60)


async def test_no_thread_is_left_when_all_clients_are_closed(generation, value):
    def use():
        value.get_probe()
        generation.get_policy()
        value.close()
        generation.close()
        return [thread for thread in threading.enumerate() if thread.name == "poise_client"]

    assert await asyncio.to_thread(use) == []


def script(target, body):
    code = (
        "import signal\nfrom poise_client import *\nfrom poise_client.types import Prompt\n"
        # A job that a shell put in the background is born deaf to Ctrl-C, and so are its children.
        f"signal.signal(signal.SIGINT, signal.default_int_handler)\ntarget = {target!r}\n"
    )
    return [sys.executable, "-c", code + textwrap.dedent(body)]


async def finish(process):
    """Return a script's exit code and what it wrote to stdout and stderr."""
    output, problems = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, output.decode(), problems.decode()


async def start(command):
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)


async def test_ctrl_c_cancels_a_call_in_the_service(target, value_service):
    value_service.script = [value_service.hang]
    process = await start(
        script(
            target,
            """
            with ValueClient(target) as client:
                try:
                    client.get_probe()
                except KeyboardInterrupt:
                    print("interrupted")
                input()
                print(client.get_probe().num_pending)
            """,
        )
    )
    await asyncio.wait_for(value_service.started.wait(), 60)
    process.send_signal(signal.SIGINT)
    await asyncio.wait_for(value_service.cancelled.wait(), 60)
    process.stdin.write(b"\n")
    assert await finish(process) == (0, "interrupted\n4\n", "")


async def test_ctrl_c_cancels_a_stream_in_the_service(target, generation_service):
    generation_service.script = [generation_service.stream(then=generation_service.hang)]
    process = await start(
        script(
            target,
            """
            with GenerationClient(target) as client:
                groups = client.stream_trajectories("run", 0, [Prompt("a", "?")], num_rollouts=1)
                try:
                    for group in groups:
                        print(group)
                except KeyboardInterrupt:
                    print("interrupted")
                input()
                print(list(groups))
            """,
        )
    )
    await asyncio.wait_for(generation_service.started.wait(), 60)
    process.send_signal(signal.SIGINT)
    await asyncio.wait_for(generation_service.cancelled.wait(), 60)
    process.stdin.write(b"\n")
    assert await finish(process) == (0, "interrupted\n[]\n", "")


async def test_a_script_that_never_closes_its_clients_ends_quietly(target):
    code, output, problems = await finish(
        await start(
            script(
                target,
                """
            value, generation = ValueClient(target), GenerationClient(target)
            groups = generation.stream_trajectories("run", 0, [Prompt("a", "?"), Prompt("b", "?")], num_rollouts=1)
            print(value.get_probe().num_pending, next(groups).group_id)
            """,
            )
        )
    )
    assert (code, output.split(), problems) == (0, ["4", "a"], "")
