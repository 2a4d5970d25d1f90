import dataclasses
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tests.support.groups import make_group

from poise_client import codec, types
from poise_client.codec import CodecError
from poise_proto.v1 import common_pb2, generation_pb2, learner_pb2, value_pb2

texts = st.text(max_size=5)
names = st.text(min_size=1, max_size=5)
uint32s = st.integers(0, 2**32 - 1)
uint64s = st.integers(0, 2**64 - 1)
singles = st.floats(width=32, allow_nan=False)
doubles = st.floats(allow_nan=False)
digests = st.binary(max_size=32)
booleans = st.booleans()
roles = st.sampled_from(["system", "user", "assistant"])
reasons = st.sampled_from(["stale", "duplicate", "future_version", "failed"])
states = st.sampled_from(["idle", "training", "publishing", "recovering", "paused"])


estimators = st.sampled_from(["probe", "score_mean", "score_prefix", "score_prompt", "auto"])


def floats(size):
    return npst.arrays(np.float32, size, elements=st.floats(width=32, allow_nan=False))


def halves(size):
    return npst.arrays(np.float16, size, elements=st.floats(width=16, allow_nan=False))


def ints(size):
    return npst.arrays(np.int32, size)


def tuples(strategy, max_size=3):
    return st.lists(strategy, max_size=max_size).map(tuple)


def nones(size):
    return st.just([None] * size)


entropies = st.builds(types.EntropyStats, singles, singles, singles, singles)
features = st.integers(0, 3).flatmap(
    lambda d: st.builds(types.Features, floats(d), floats(d), entropies, entropies, entropies)
)
rollout_ids = st.builds(types.RolloutId, names, uint64s, names, uint32s)
spans = st.builds(types.VersionSpan, uint32s, uint32s, uint64s)
contents = st.one_of(
    texts,
    st.lists(st.fixed_dictionaries({"role": roles, "content": texts}), min_size=1, max_size=3),
    st.lists(uint32s, min_size=1, max_size=3),
)


@st.composite
def sampled_groups(draw):
    prompt = draw(ints(2))

    def rollout(size):
        return types.Rollout(
            id=draw(rollout_ids),
            prompt_token_ids=prompt,
            token_ids=draw(ints(size)),
            logprobs=draw(floats(size)),
            features=draw(features),
            version_spans=draw(tuples(spans)),
            finish_reason=draw(st.sampled_from(["stop", "length", "abort"])),
            text=draw(texts),
            token_entropies=draw(halves(size)),
            sum_squared_probs=draw(halves(size)),
            first_token_s=draw(doubles),
            total_s=draw(doubles),
        )

    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    return types.Group(draw(names), tuple(rollout(size) for size in sizes))


@st.composite
def questions(draw):
    siblings = draw(st.lists(features, max_size=3))
    rewards = draw(st.none() | floats(len(siblings)))
    return make_group(draw(names), siblings, rewards, domain=draw(names), run_id="")


@st.composite
def labels(draw):
    siblings = draw(st.lists(features, min_size=1, max_size=2))
    rewards, ids = draw(floats(len(siblings))), {"run_id": draw(names), "step": draw(uint64s)}
    group = make_group(draw(names), siblings, rewards, domain=draw(names), **ids)
    rollouts = tuple(with_token_statistics(draw, rollout) for rollout in group.rollouts)
    return dataclasses.replace(
        group, rollouts=rollouts, num_rollouts=draw(uint32s), prompt_id=draw(st.just("") | names)
    )


def with_token_statistics(draw, rollout):
    size = draw(st.integers(0, 3))
    if not size:
        return rollout
    return dataclasses.replace(
        rollout,
        logprobs=draw(floats(size)),
        token_entropies=draw(halves(size)),
        sum_squared_probs=draw(halves(size)),
    )


@st.composite
def group_baselines(draw):
    if draw(booleans):
        return types.GroupBaselines(draw(names), 0, None, None, draw(booleans))
    size = draw(st.integers(1, 3))
    values, baselines, tokens = draw(floats(size)), None, None
    if draw(booleans):
        baselines = draw(st.none() | floats(size))
    else:
        tokens = tuple(draw(floats(draw(st.integers(0, 3)))) for _ in range(size))
    return types.GroupBaselines(draw(names), draw(uint64s), values, baselines, draw(booleans), draw(estimators), tokens)


@st.composite
def training_rollouts(draw):
    size = draw(st.integers(0, 4))
    return types.Rollout(
        id=draw(rollout_ids),
        prompt_token_ids=draw(ints(2)),
        token_ids=draw(ints(size)),
        logprobs=draw(floats(size)),
        version_spans=draw(tuples(spans)),
        advantage=draw(st.none() | singles),
        advantages=draw(st.none() | floats(size)),
        reward=draw(st.none() | singles),
    )


def numbers_of(kind, **others):
    """Return instances of a dataclass of numbers; `others` are its other fields."""
    drawn = {"float": st.floats(), "int": uint32s, "str": names, "bool": booleans, "bytes": digests}
    plain = {field.name: drawn[field.type] for field in dataclasses.fields(kind) if field.name not in others}
    return st.builds(kind, **plain, **others)


metrics = numbers_of(types.StepMetrics, staleness=st.dictionaries(uint32s, uint32s, max_size=3))
replicas = numbers_of(types.ReplicaResult)
qualities = numbers_of(types.ProbeQuality, calibration=tuples(numbers_of(types.CalibrationBin)))
estimator_errors = numbers_of(types.EstimatorError, estimator=estimators)
probes = numbers_of(
    types.ProbeStatus,
    quality=qualities,
    configured=estimators,
    estimator=st.just("") | estimators,
    errors=tuples(estimator_errors),
)
hidden = st.integers(0, 3).flatmap(floats)

PAIRS = {
    types.Adapter: (numbers_of(types.Adapter), generation_pb2.WeightsAdapter),
    types.RolloutId: (rollout_ids, common_pb2.RolloutId),
    types.VersionSpan: (spans, common_pb2.VersionSpan),
    types.Features: (features, common_pb2.RolloutFeatures),
    types.Prompt: (st.builds(types.Prompt, names, contents), generation_pb2.PromptSpec),
    types.Sampling: (
        st.builds(
            types.Sampling, singles, singles, uint32s, uint32s, tuples(texts), st.none() | uint64s, tuples(uint32s)
        ),
        generation_pb2.SamplingParams,
    ),
    types.Group: (sampled_groups(), generation_pb2.StreamTrajectoriesResponse),
    types.EncodedPrompt: (
        numbers_of(types.EncodedPrompt, prompt_hidden=hidden),
        generation_pb2.EncodePromptsResponse,
    ),
    types.PromptCheck: (numbers_of(types.PromptCheck), generation_pb2.PromptCheck),
    types.Policy: (
        numbers_of(types.Policy, process_group_backend=st.sampled_from(["", "nccl", "gloo"])),
        generation_pb2.GetPolicyResponse,
    ),
    types.WeightUpdate: (numbers_of(types.WeightUpdate), generation_pb2.UpdateWeightsResponse),
    "question": (questions(), value_pb2.GroupFeatures),
    "label": (labels(), value_pb2.LabelledGroup),
    types.GroupBaselines: (group_baselines(), value_pb2.GroupBaselines),
    types.PromptFeatures: (numbers_of(types.PromptFeatures, prompt_hidden=hidden), value_pb2.PromptFeatures),
    types.PromptScore: (
        st.builds(types.PromptScore, names, uint64s, singles)
        | names.map(lambda name: types.PromptScore(name, 0, None)),
        value_pb2.PromptScore,
    ),
    types.ProbeReport: (
        numbers_of(
            types.ProbeReport,
            probes=tuples(probes),
            estimator=estimators,
            domain_estimators=st.dictionaries(names, estimators, max_size=2),
        ),
        value_pb2.GetProbeResponse,
    ),
    types.Rollout: (training_rollouts(), learner_pb2.TrainingRollout),
    types.StepMetrics: (metrics, learner_pb2.StepMetrics),
    types.ReplicaResult: (replicas, learner_pb2.ReplicaResult),
    types.StepResult: (
        numbers_of(
            types.StepResult,
            metrics=metrics,
            rejected=tuples(st.tuples(rollout_ids, reasons)),
            replicas=tuples(replicas),
        ),
        learner_pb2.SubmitAdvantagesResponse,
    ),
    types.LearnerStatus: (
        numbers_of(
            types.LearnerStatus,
            state=states,
            num_rejected=st.dictionaries(reasons, uint64s, max_size=2),
            replicas=tuples(replicas),
        ),
        learner_pb2.GetStatusResponse,
    ),
    types.ModelExport: (numbers_of(types.ModelExport), learner_pb2.ExportModelResponse),
}
"""Each type with its strategy and its message type."""


def plain(value):
    """Return a value whose arrays and NaNs compare by content."""
    if dataclasses.is_dataclass(value):
        return type(value), [plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return "nan" if isinstance(value, float) and math.isnan(value) else value


@pytest.mark.parametrize("name", PAIRS)
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
@given(st.data())
def test_a_value_survives_encoding_and_decoding(name, data):
    strategy, message_class = PAIRS[name]
    value = data.draw(strategy)
    message = codec.encode(value, message_class)
    back = codec.decode(message_class.FromString(message.SerializeToString()), type(value))
    assert plain(back) == plain(value)


NOT_COPIED = {
    types.Prompt: {"content", "text", "chat", "tokens"},  # converted by hand
    types.Features: {"tokens"},  # in fields of Rollout
    types.Group: {"domain", "num_rollouts", "prompt_id", "prompt_token_ids"},
    types.GroupBaselines: {"status"},
    types.PromptScore: {"status"},
    types.Rollout: {
        "features",
        "finish_reason",
        "text",
        "token_entropies",
        "sum_squared_probs",
        "first_token_s",
        "total_s",
    },
}


@pytest.mark.parametrize("kind", [kind for kind in PAIRS if isinstance(kind, type)])
def test_type_and_message_have_the_same_fields(kind):
    fields = {field.name for field in dataclasses.fields(kind)}
    assert fields ^ set(PAIRS[kind][1].DESCRIPTOR.fields_by_name) == NOT_COPIED.get(kind, set())


def test_a_batch_header_counts_its_rollouts():
    batch = types.Batch("run", "step-1", 1, (training_rollout(),) * 3, temperature=0.5)
    header = codec.encode(batch, learner_pb2.BatchHeader)
    assert header.num_rollouts == 3
    assert codec.decode_fields(header, types.Batch, rollouts=()) == dataclasses.replace(batch, rollouts=())


def test_unset_fields_get_the_documented_default():
    assert codec.decode(generation_pb2.SamplingParams(), types.Sampling) == types.Sampling()
    assert codec.decode_fields(learner_pb2.BatchHeader(), types.Batch, rollouts=()).temperature == 1.0
    assert codec.decode(value_pb2.GroupFeatures(), types.Group).domain == "default"
    prompt = value_pb2.PromptFeatures(prompt_hidden=codec.to_tensor([1.0], "float32"))
    assert codec.decode(prompt, types.PromptFeatures).domain == "default"


def test_greedy_differs_from_unset():
    message = codec.encode(types.Sampling(temperature=0.0), generation_pb2.SamplingParams)
    assert codec.decode(message, types.Sampling).temperature == 0.0


@pytest.mark.parametrize(
    "content",
    [
        pytest.param([], id="empty"),
        pytest.param([{"role": "user"}], id="a message without content"),
        pytest.param([{"role": "user", "content": "?", "name": "x"}], id="a message with more"),
        pytest.param([{"role": "user", "content": "?"}, 3], id="messages and ids mixed"),
        pytest.param([1.5], id="floats"),
        pytest.param([-1], id="a negative id"),
        pytest.param([2**32], id="an id too large"),
        pytest.param(["a"], id="strings"),
    ],
)
def test_an_invalid_prompt_is_rejected_by_name(content):
    with pytest.raises(CodecError, match="required: text") as caught:
        codec.encode(types.Prompt("g", content), generation_pb2.PromptSpec, "prompts[3]")
    assert caught.value.field == "prompts[3].content"


def test_an_unknown_role_is_rejected_with_the_known_ones():
    turns = [{"role": "user", "content": "?"}, {"role": "pope", "content": "!"}]
    with pytest.raises(CodecError, match="is 'pope'; required: one of system, user, assistant") as caught:
        codec.encode(types.Prompt("g", turns), generation_pb2.PromptSpec, "prompts[3]")
    assert caught.value.field == "prompts[3].chat.messages[1].role"


# Messages as a peer should not send them: each starts valid and is broken in one field.


def state():
    return types.Features(np.ones(3, np.float32), np.ones(3, np.float32))


def whole_features():
    return codec.encode(state(), common_pb2.RolloutFeatures)


def whole_rollout():
    tokens, logprobs = np.arange(2, dtype=np.int32), np.zeros(2, np.float32)
    rollout = types.Rollout(
        types.RolloutId("run", 0, "g", 0),
        tokens,
        tokens,
        logprobs,
        features=state(),
        token_entropies=logprobs.astype(np.float16),
        sum_squared_probs=logprobs.astype(np.float16),
    )
    return codec.encode(rollout, generation_pb2.Rollout)


def whole_labels():
    return codec.encode(make_group("g", [state()] * 2, [0, 1]), value_pb2.LabelledGroup)


def whole_question():
    return codec.encode(make_group("g", [state()] * 2, [0, 1]), value_pb2.GroupFeatures)


def whole_encoded_prompt():
    return codec.encode(types.EncodedPrompt("g", 3, np.ones(3, np.float32), 1), generation_pb2.EncodePromptsResponse)


def whole_prompt_features():
    return codec.encode(types.PromptFeatures("g", "d", np.ones(3, np.float32)), value_pb2.PromptFeatures)


def whole_score():
    return codec.encode(types.PromptScore("g", 1, 0.5), value_pb2.PromptScore)


def whole_baselines():
    numbers = np.array([0.5, 0.25], np.float32)
    return codec.encode(types.GroupBaselines("g", 1, numbers, numbers), value_pb2.GroupBaselines)


def whole_status():
    replica = types.ReplicaResult("a:1", 1, True, "", 0.0, 0.0)
    status = types.LearnerStatus("l", 1, 1, "idle", 1, 1, {"stale": 1}, "m", 1, (replica,), b"", "")
    return codec.encode(status, learner_pb2.GetStatusResponse)


def training_rollout():
    tokens, logprobs = np.arange(2, dtype=np.int32), np.zeros(2, np.float32)
    return types.Rollout(types.RolloutId("run", 0, "g", 0), tokens, tokens, logprobs, advantage=0.5)


def whole_training():
    return codec.encode(training_rollout(), learner_pb2.TrainingRollout)


THREE = codec.to_tensor([1.0, 2.0, 3.0], "float32")
HALVES = codec.to_tensor([1.0, 2.0, 3.0], "float16")
CASES = [
    # a valid message, its type, the broken field, its value (None clears it)
    (whole_features, types.Features, "prompt_hidden", None),
    (whole_features, types.Features, "response_hidden", codec.to_tensor([1.0], "float32")),
    (whole_rollout, types.Rollout, "token_ids", None),
    (whole_rollout, types.Rollout, "token_ids", codec.to_tensor([1, 2], "int64")),
    (whole_rollout, types.Rollout, "logprobs", None),
    (whole_rollout, types.Rollout, "logprobs", THREE),
    (whole_rollout, types.Rollout, "token_entropies", THREE),
    (whole_rollout, types.Rollout, "token_entropies", HALVES),
    (whole_rollout, types.Rollout, "sum_squared_probs", HALVES),
    (whole_rollout, types.Rollout, "sum_squared_probs", None),
    (whole_training, types.Rollout, "advantages", THREE),
    (whole_rollout, types.Rollout, "finish_reason", None),
    (whole_rollout, types.Rollout, "finish_reason", 77),
    (whole_labels, types.Group, "schema_version", None),
    (whole_labels, types.Group, "schema_version", 1),
    (whole_labels, types.Group, "rewards", None),
    (whole_labels, types.Group, "rewards", THREE),
    (whole_question, types.Group, "rewards", THREE),
    (whole_question, types.Group, "rewards", codec.to_tensor([1, 2], "int32")),
    (whole_baselines, types.GroupBaselines, "status", None),
    (whole_baselines, types.GroupBaselines, "status", 77),
    (whole_baselines, types.GroupBaselines, "values", None),
    (whole_baselines, types.GroupBaselines, "baselines", THREE),
    (whole_encoded_prompt, types.EncodedPrompt, "prompt_hidden", None),
    (whole_prompt_features, types.PromptFeatures, "prompt_hidden", None),
    (whole_prompt_features, types.PromptFeatures, "prompt_hidden", codec.to_tensor([1], "int32")),
    (whole_score, types.PromptScore, "status", None),
    (whole_score, types.PromptScore, "status", 77),
    (whole_status, types.LearnerStatus, "state", None),
    (whole_status, types.LearnerStatus, "state", 77),
    (whole_training, types.Rollout, "prompt_token_ids", None),
    (whole_training, types.Rollout, "token_ids", None),
    (whole_training, types.Rollout, "logprobs", None),
    (whole_training, types.Rollout, "logprobs", THREE),
]


@pytest.mark.parametrize(("whole", "kind", "field", "broken"), CASES)
def test_a_broken_message_is_rejected_by_the_field(whole, kind, field, broken):
    message = whole()
    codec.decode(message, kind, "x[1]")
    if broken is None:
        message.ClearField(field)
    elif isinstance(broken, int):
        setattr(message, field, broken)
    else:
        getattr(message, field).CopyFrom(broken)
    with pytest.raises(CodecError) as caught:
        codec.decode(message, kind, "x[1]")
    assert caught.value.field == f"x[1].{field}"


@pytest.mark.parametrize(
    ("estimator", "hidden", "has_tokens"),
    [
        ("probe", (True, True), False),
        ("score_mean", (False, False), True),
        ("score_prefix", (False, False), True),
        ("score_prompt", (True, False), True),
        ("auto", (True, False), True),
    ],
)
def test_only_inputs_of_the_estimator_are_sent(estimator, hidden, has_tokens):
    states = types.Features(np.ones(3, np.float32), np.ones(3, np.float32))
    tokens = {"logprobs": np.zeros(2, np.float32), "token_entropies": np.zeros(2, np.float16)}
    tokens["sum_squared_probs"] = np.ones(2, np.float16)
    sampled = types.Group("a", (types.Rollout(types.RolloutId("run", 0, "a", 0), features=states, **tokens),), "math")
    report = types.ProbeReport((), 0, 0, 0, 0, "score_mean", {"math": estimator})
    (message,) = codec.encode(report.needed_inputs(sampled), value_pb2.GroupFeatures).rollouts
    assert (message.HasField("prompt_hidden"), message.HasField("response_hidden")) == hidden
    assert message.HasField("tokens") == has_tokens
    read = codec.decode(message, types.Features)
    assert (bool(read.prompt_hidden.size), bool(read.response_hidden.size)) == hidden


def test_the_path_names_the_invalid_sibling():
    message = whole_question()
    message.rollouts[1].ClearField("prompt_hidden")
    with pytest.raises(CodecError) as caught:
        codec.decode(message, types.Group, "groups[4]")
    assert caught.value.field == "groups[4].rollouts[1].prompt_hidden"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (generation_pb2.PromptSpec(group_id="g"), "p.prompt"),
        (generation_pb2.PromptSpec(group_id="g", chat=generation_pb2.ChatPrompt()), "p.chat"),
        (generation_pb2.PromptSpec(group_id="g", tokens=generation_pb2.TokenPrompt()), "p.tokens"),
    ],
)
def test_an_empty_prompt_is_rejected(message, field):
    with pytest.raises(CodecError) as caught:
        codec.decode(message, types.Prompt, "p")
    assert caught.value.field == field


@pytest.mark.parametrize("kind", [value_pb2.GroupFeatures, value_pb2.LabelledGroup])
def test_a_missing_reward_is_rejected_by_its_rollout(kind):
    group = make_group("g", [state()] * 2, [0, 1])
    partly = dataclasses.replace(
        group, rollouts=(group.rollouts[0], dataclasses.replace(group.rollouts[1], reward=None))
    )
    with pytest.raises(CodecError, match="set the reward of every rollout") as caught:
        codec.encode(partly, kind, "groups[2]")
    assert caught.value.field == "groups[2].rollouts[1].reward"


def test_an_incomplete_group_keeps_the_number_sampled():
    group = make_group("g", [state()] * 3, [0, 1, 1])
    part = dataclasses.replace(group, rollouts=group.rollouts[:2])
    assert codec.encode(part, value_pb2.LabelledGroup).num_rollouts == 3


@pytest.mark.parametrize("rewards", [[1], [1, 2, 3], 1.0, [[1, 0]]])
def test_a_group_takes_one_reward_for_each_rollout(rewards):
    with pytest.raises(ValueError, match="group 'g' has 2 rollouts but rewards of shape"):
        make_group("g", [state()] * 2).scored(rewards)


def test_arrays_of_two_axes_are_rejected():
    wide = types.Features(np.ones((1, 3), np.float32), np.ones(3, np.float32))
    with pytest.raises(CodecError, match="required: 1 axis") as caught:
        codec.encode(wide, common_pb2.RolloutFeatures, "z")
    assert caught.value.field == "z.prompt_hidden"
