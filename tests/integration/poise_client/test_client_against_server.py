import asyncio
import hashlib
import time
from contextlib import aclosing

import grpc
import numpy as np
import pytest
from tests.support.groups import make_group

from poise_client import (
    AsyncGenerationClient,
    AsyncLearnerClient,
    AsyncValueClient,
    RetryPolicy,
    errors,
    weights_digest,
)
from poise_client.types import (
    Batch,
    Features,
    Prompt,
    PromptFeatures,
    Rollout,
    RolloutId,
    WeightArray,
)
from poise_proto.v1 import value_pb2

QUICK = RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.02)
PROMPTS = [Prompt(name, "?") for name in "abcd"]


@pytest.fixture
async def generation(target):
    async with AsyncGenerationClient(target, retries=QUICK, timeout_s=20) as client:
        yield client


@pytest.fixture
async def value(target):
    async with AsyncValueClient(target, retries=QUICK, timeout_s=20) as client:
        yield client


@pytest.fixture
async def learner(target):
    async with AsyncLearnerClient(target, retries=QUICK, timeout_s=20) as client:
        yield client


def requested(service):
    return [[prompt.group_id for prompt in request.prompts] for request in service.requests]


async def collect(stream):
    return [group async for group in stream]


async def test_groups_are_yielded_when_complete(generation, generation_service):
    generation_service.script = [generation_service.stream("c", "a", "d", "b")]
    groups = await collect(generation.stream_trajectories("run", 7, PROMPTS, num_rollouts=2))
    assert [group.group_id for group in groups] == ["c", "a", "d", "b"]
    assert [rollout.id for rollout in groups[0].rollouts] == [RolloutId("run", 7, "c", 0), RolloutId("run", 7, "c", 1)]


async def test_a_broken_stream_resumes_with_unfinished_groups(generation, generation_service, unavailable):
    generation_service.script = [
        generation_service.stream("b", "d", then=unavailable),
        generation_service.stream(then=unavailable),
        generation_service.stream("c", "b", "a"),  # b comes again: it was finished
    ]
    groups = await collect(generation.stream_trajectories("run", 0, PROMPTS, num_rollouts=1))
    assert [group.group_id for group in groups] == ["b", "d", "c", "a"]
    assert requested(generation_service) == [list("abcd"), list("ac"), list("ac")]


async def test_a_stream_that_ends_early_is_resumed(generation, generation_service):
    generation_service.script = [generation_service.stream("a", "b", "c")]
    groups = await collect(generation.stream_trajectories("run", 0, PROMPTS, num_rollouts=1))
    assert [group.group_id for group in groups] == list("abcd")
    assert requested(generation_service) == [list("abcd"), ["d"]]


async def test_an_error_mid_stream_has_the_indices_of_the_caller(generation, generation_service, failing, unavailable):
    wrong = failing(
        grpc.StatusCode.INVALID_ARGUMENT,
        reason="INVALID_REQUEST",
        retryable=False,
        violations=[("prompts[1].text", "is too long")],
    )
    generation_service.script = [
        generation_service.stream("a", "c", then=unavailable),
        generation_service.stream(then=wrong),
    ]
    with pytest.raises(errors.InvalidRequestError) as caught:
        await collect(generation.stream_trajectories("run", 0, PROMPTS, num_rollouts=1))
    assert caught.value.violations == (("prompts[3].text", "is too long"),)
    assert caught.value.attempts == 2


async def test_many_prompts_are_split_and_yielded_once(generation, generation_service):
    prompts = [Prompt(f"g{i}", "x" * 400_000) for i in range(10)]
    groups = await collect(generation.stream_trajectories("run", 0, prompts, num_rollouts=1))
    assert [group.group_id for group in groups] == [f"g{i}" for i in range(10)]
    assert len(generation_service.requests) == 2


async def test_closing_a_stream_cancels_it_in_the_service(generation, generation_service):
    generation_service.script = [generation_service.stream("a", then=generation_service.hang)]
    async with aclosing(generation.stream_trajectories("run", 0, PROMPTS, num_rollouts=1)) as groups:
        assert (await anext(groups)).group_id == "a"
        assert not generation_service.cancelled.is_set()
    await asyncio.wait_for(generation_service.cancelled.wait(), 60)


async def test_encoded_prompts_keep_their_order_over_retries(generation, generation_service, unavailable):
    generation_service.script = [
        generation_service.stream("d", "b", then=unavailable),
        generation_service.stream("c", "b"),  # b comes again, and the stream ends early
    ]
    prompts = await generation.encode_prompts(PROMPTS)
    assert [(prompt.group_id, prompt.num_prompt_tokens, prompt.policy_version) for prompt in prompts] == [
        (name, 4, 3) for name in "abcd"
    ]
    assert requested(generation_service) == [list("abcd"), list("ac"), ["a"]]
    assert await generation.encode_prompts([]) == []


async def test_prompts_to_encode_are_checked_and_split(generation, generation_service):
    with pytest.raises(errors.InvalidRequestError, match="is the group_id of an earlier prompt"):
        await generation.encode_prompts([PROMPTS[0], PROMPTS[0]])
    with pytest.raises(errors.InvalidRequestError, match="required: text"):
        await generation.encode_prompts([Prompt("a", [])])
    prompts = await generation.encode_prompts([Prompt(f"g{i}", "x" * 400_000) for i in range(10)])
    assert [prompt.group_id for prompt in prompts] == [f"g{i}" for i in range(10)]
    assert len(generation_service.requests) == 2


async def test_checked_prompts_keep_their_order_over_retries(generation, generation_service, unavailable):
    generation_service.script = [unavailable]
    sizes = [*range(5), *[400_000] * 10, *range(5)]
    checks = await generation.check_prompts([Prompt(f"g{i}", "x" * size) for i, size in enumerate(sizes)])
    assert [(check.group_id, check.num_tokens) for check in checks] == [(f"g{i}", n) for i, n in enumerate(sizes)]
    assert len(generation_service.requests) == 3
    assert await generation.check_prompts([]) == []


async def test_invalid_prompts_to_check_are_named_by_index(generation, generation_service, failing):
    async def answer(request, context):
        return None  # as it should

    wrong = [("prompts[0].chat", "no")]
    reject = failing(grpc.StatusCode.INVALID_ARGUMENT, reason="INVALID_REQUEST", retryable=False, violations=wrong)
    generation_service.script = [answer, reject]
    prompts = [Prompt(f"g{i}", "x" * 2**20) for i in range(4)]
    with pytest.raises(errors.InvalidRequestError) as caught:
        await generation.check_prompts(prompts)
    assert caught.value.violations == (("prompts[2].chat", "no"),)


async def test_an_abandoned_encoding_is_cancelled_in_the_service(generation, generation_service):
    generation_service.script = [generation_service.stream("a", then=generation_service.hang)]
    call = asyncio.create_task(generation.encode_prompts(PROMPTS))
    await asyncio.wait_for(generation_service.started.wait(), 60)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.wait_for(generation_service.cancelled.wait(), 60)


async def test_cancelling_a_task_cancels_the_call_in_the_service(value, value_service):
    value_service.script = [value_service.hang]
    call = asyncio.create_task(value.get_probe())
    await asyncio.wait_for(value_service.started.wait(), 60)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.wait_for(value_service.cancelled.wait(), 60)
    assert len(value_service.requests) == 1


async def test_closing_the_client_ends_its_calls_with_an_error(value, value_service):
    value_service.script = [value_service.hang]
    call = asyncio.create_task(value.get_probe())
    await asyncio.wait_for(value_service.started.wait(), 60)
    await value.close()
    with pytest.raises(errors.UnavailableError, match="closed during the call"):
        await call


async def test_unavailable_services_are_retried(value, value_service, unavailable):
    value_service.script = [unavailable, unavailable]
    assert (await value.get_probe()).num_pending == 4
    assert len(value_service.requests) == 3


async def test_an_absent_service_is_retried_until_the_deadline(unused_port):
    async with AsyncValueClient(f"127.0.0.1:{unused_port}", retries=QUICK, timeout_s=3) as client:
        with pytest.raises((errors.UnavailableError, errors.DeadlineExceededError)) as caught:
            await client.get_probe()
    assert caught.value.attempts > 1


async def test_retry_after_of_a_full_queue_is_obeyed(value, value_service, failing):
    value_service.script = [failing(grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUEUE_FULL", retry_after_s=0.3)]
    started_s = time.monotonic()
    assert await value.publish_labels([labelled("g")]) == 1
    assert time.monotonic() - started_s >= 0.3
    assert len(value_service.requests) == 2


async def test_a_queue_that_stays_full_fails_before_the_deadline(value, value_service, failing):
    full = failing(grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUEUE_FULL", retry_after_s=30)
    value_service.script = [full]
    with pytest.raises(errors.QueueFullError) as caught:
        await value.publish_labels([labelled("g")], timeout_s=5)
    assert (caught.value.retry_after_s, caught.value.attempts) == (30, 1)


async def test_the_limit_of_attempts_is_obeyed(target, value_service, unavailable):
    value_service.script = [unavailable] * 3
    async with AsyncValueClient(target, retries=RetryPolicy(max_attempts=2, initial_backoff_s=0.01)) as client:
        with pytest.raises(errors.UnavailableError) as caught:
            await client.get_probe()
    assert caught.value.attempts == 2
    assert caught.value.reason == "DRAINING"
    assert caught.value.call == f"ValueService.GetProbe at {target}"


async def test_permanent_errors_are_not_retried(value, value_service, failing):
    value_service.script = [
        failing(grpc.StatusCode.FAILED_PRECONDITION, reason="LABELS_CONSUMED", retryable=False),
    ]
    with pytest.raises(errors.LabelsConsumedError):
        await value.estimate_baselines("run", 0, [unlabelled("g")])
    assert len(value_service.requests) == 1


async def test_a_deadline_also_ends_the_call_in_the_service(value, value_service):
    value_service.script = [value_service.hang]
    with pytest.raises(errors.DeadlineExceededError, match="no answer within 2 s"):
        await value.get_probe(timeout_s=2)  # long enough to reach the service first
    await asyncio.wait_for(value_service.cancelled.wait(), 60)


async def test_the_deadline_ends_a_stream_that_keeps_failing(generation, generation_service, unavailable):
    generation_service.script = [generation_service.stream(then=unavailable)] * 1000
    with pytest.raises(errors.PoiseClientError):
        await collect(generation.stream_trajectories("run", 0, PROMPTS, num_rollouts=1, timeout_s=0.3))
    assert len(generation_service.script) > 0


async def test_the_token_is_sent_as_a_bearer_token(target, value_service):
    async with AsyncValueClient(target, token="t0ken") as client:
        await client.get_probe()
    assert value_service.metadata[0]["authorization"] == "Bearer t0ken"


async def test_an_unknown_call_is_reported(target):
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with AsyncValueClient(f"127.0.0.1:{port}") as client:
        with pytest.raises(errors.NotFoundError, match="this service's gRPC port"):
            await client.get_probe()
    await server.stop(None)


WIDE = np.zeros(2560, np.float32)


def unlabelled(group_id, width=2):
    return make_group(group_id, [Features(WIDE[:width], WIDE[:width])] * 2, domain="math")


def labelled(group_id, width=2):
    return unlabelled(group_id, width).scored([0, 0])


async def test_many_groups_are_split_and_answered_in_order(value, value_service):
    names = [f"g{i}" for i in range(256)]
    requested = [unlabelled(name, 2560) for name in names]
    answers = await value.estimate_baselines("run", 5, requested, wait_for_labels_s=2.5)
    assert [answer.group_id for answer in answers] == names
    assert len(value_service.requests) == 4
    for request in value_service.requests:
        assert request.ByteSize() <= 3 * 2**20
        assert (request.run_id, request.step, request.wait_for_labels_s) == ("run", 5, 2.5)
    sent = [group.group_id for request in value_service.requests for group in request.groups]
    assert sent == names


async def test_many_prompts_to_score_are_split_and_answered_in_order(value, value_service, failing):
    prompts = [PromptFeatures(f"g{i}", "math", WIDE) for i in range(400)]
    scores = await value.score_prompts(prompts)
    assert [score.group_id for score in scores] == [prompt.group_id for prompt in prompts]
    assert {score.value for score in scores} == {0.25, 1.0}
    assert len(value_service.requests) == 2
    assert max(request.ByteSize() for request in value_service.requests) <= 3 * 2**20
    first = len(value_service.requests[0].prompts)

    async def fine(request, context):
        return None

    wrong = failing(
        grpc.StatusCode.INVALID_ARGUMENT,
        reason="INVALID_REQUEST",
        retryable=False,
        violations=[("prompts[1].prompt_hidden", "is 3 wide")],
    )
    value_service.script = [fine, wrong]
    with pytest.raises(errors.InvalidRequestError) as caught:
        await value.score_prompts(prompts)
    assert caught.value.violations == ((f"prompts[{first + 1}].prompt_hidden", "is 3 wide"),)


@pytest.mark.parametrize(
    "scores",
    [[], [value_pb2.PromptScore(group_id="h", status=1)], [value_pb2.PromptScore(group_id="g")]],
    ids=["none", "another prompt", "no status"],
)
async def test_malformed_scores_are_an_error(value, value_service, scores):
    async def nonsense(request, context):
        return value_pb2.ScorePromptsResponse(prompts=scores)

    value_service.script = [nonsense]
    with pytest.raises(errors.InternalError, match="is malformed"):
        await value.score_prompts([PromptFeatures("g", "math", WIDE)])


async def test_many_labels_are_split_and_counted(value, value_service, unavailable):
    names = [f"g{i}" for i in range(256)]
    value_service.script = [unavailable]
    assert await value.publish_labels([labelled(name, 2560) for name in names]) == 256
    assert len(value_service.requests) == 5  # four, and one of them again
    assert max(request.ByteSize() for request in value_service.requests) <= 3 * 2**20


async def test_an_error_in_a_later_part_has_the_callers_index(value, value_service, failing):
    async def fine(request, context):
        return None

    wrong = failing(
        grpc.StatusCode.INVALID_ARGUMENT,
        reason="INVALID_REQUEST",
        retryable=False,
        violations=[("groups[1].domain", "is empty")],
    )
    value_service.script = [fine, wrong]
    with pytest.raises(errors.InvalidRequestError) as caught:
        await value.publish_labels([labelled(f"g{i}", 2560) for i in range(256)])
    first = len(value_service.requests[0].groups)
    assert caught.value.violations == ((f"groups[{first + 1}].domain", "is empty"),)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(value_pb2.EstimateBaselinesResponse(), id="none"),
        pytest.param(
            value_pb2.EstimateBaselinesResponse(groups=[value_pb2.GroupBaselines(group_id="h", status=2)]),
            id="another group",
        ),
        pytest.param(
            value_pb2.EstimateBaselinesResponse(groups=[value_pb2.GroupBaselines(group_id="g", status=1)]),
            id="no numbers",
        ),
    ],
)
async def test_a_malformed_answer_is_an_error(value, value_service, answer):
    async def nonsense(request, context):
        return answer

    value_service.script = [nonsense]
    with pytest.raises(errors.InternalError, match="is malformed"):
        await value.estimate_baselines("run", 0, [unlabelled("g")])


async def test_weights_arrive_in_chunks_with_offsets_and_digests(generation, generation_service, unavailable):
    rng = np.random.default_rng(0)
    weights = {
        "b": WeightArray(rng.integers(0, 2**16, (700, 1000), dtype=np.uint16), "bfloat16"),
        "a": WeightArray(rng.standard_normal((300, 1000)).astype(np.float32), "float32"),
    }
    generation_service.script = [unavailable]
    update = await generation.update_weights(lineage_id="l", policy_version=4, weights=weights)
    assert update.policy_version == 4
    assert len(generation_service.requests) == 2
    for messages in generation_service.requests:
        begin, commit = messages[0].manifest, messages[-1].commit
        received = bytearray()
        for message in messages[1:-1]:
            assert message.chunk.offset == len(received)
            assert 0 < len(message.chunk.data) <= 2**20
            received += message.chunk.data
        assert commit.total_bytes == len(received)
        assert bytes(received) == weights["b"].array.tobytes() + weights["a"].array.tobytes()
        assert [tensor.name for tensor in begin.tensors] == ["b", "a"]
        assert begin.tensors[0].sha256 == hashlib.sha256(weights["b"].array.tobytes()).digest()
        assert begin.digest == weights_digest(weights)


async def test_a_retry_sends_the_whole_batch_again(learner, learner_service, unavailable):
    ids = np.arange(3, dtype=np.int32)
    rollouts = tuple(
        Rollout(RolloutId("run", 2, "g", i), ids, ids, np.zeros(3, np.float32), advantage=0.5 - i, reward=reward)
        for i, reward in enumerate((None, 0.0))
    )
    learner_service.script = [unavailable]
    result = await learner.submit_advantages(Batch("run", "step-2", 2, rollouts))
    assert result.policy_version == 9
    assert learner_service.requests[0] == learner_service.requests[1]
    header, *rest = learner_service.requests[1]
    assert (header.header.batch_id, header.header.num_rollouts) == ("step-2", 2)
    assert [message.rollout.advantage for message in rest] == [0.5, -0.5]
    assert [message.rollout.HasField("reward") for message in rest] == [False, True]


async def test_the_learner_answers_status_and_export(learner):
    assert (await learner.get_status()).state == "idle"
    assert (await learner.export_model("final")).path == "/exports/final"


async def test_a_client_belongs_to_its_first_event_loop(target):
    client = AsyncValueClient(target)
    await client.get_probe()
    with pytest.raises(RuntimeError, match="one client per loop"):
        await asyncio.to_thread(lambda: asyncio.run(client.get_probe()))
    await client.close()
