import dataclasses
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from poise_client import codec, types
from poise_client.codec import CodecError
from poise_proto.v1 import common_pb2, generation_pb2, learner_pb2, value_pb2

names = st.text("abc./é0", min_size=1, max_size=8)
texts = st.text(max_size=8)
uint32s = st.integers(0, 2**32 - 1)
uint64s = st.integers(0, 2**64 - 1)
doubles = st.floats(allow_nan=False)
singles = st.floats(width=32, allow_nan=False)
digests = st.binary(max_size=32)
booleans = st.booleans()
roles = st.sampled_from(["system", "user", "assistant"])
reasons = st.sampled_from(["stale", "duplicate", "future_version", "failed"])
states = st.sampled_from(["idle", "training", "publishing", "recovering", "paused"])


def floats(size):
    return npst.arrays(np.float32, size, elements=st.floats(width=32, allow_nan=False))


def ints(size):
    return npst.arrays(np.int32, size)


def tuples(strategy, max_size=3):
    return st.lists(strategy, max_size=max_size).map(tuple)


entropies = st.builds(types.EntropyStats, singles, singles, singles, singles)
features = st.integers(0, 3).flatmap(
    lambda d: st.builds(types.Features, floats(d), floats(d), entropies, entropies, entropies)
)
rollout_ids = st.builds(types.RolloutId, names, uint64s, names, uint32s)
spans = st.builds(types.VersionSpan, uint32s, uint32s, uint64s)
prompts = st.builds(
    types.Prompt,
    names,
    st.one_of(
        texts,
        st.lists(st.fixed_dictionaries({"role": roles, "content": texts}), min_size=1, max_size=3),
        st.lists(uint32s, min_size=1, max_size=3),
    ),
)
samplings = st.builds(
    types.Sampling, singles, singles, uint32s, uint32s, tuples(texts), st.none() | uint64s, tuples(uint32s)
)


@st.composite
def rollouts(draw):
    size = draw(st.integers(0, 4))
    return types.Rollout(
        id=draw(rollout_ids),
        token_ids=draw(ints(size)),
        logprobs=draw(floats(size)),
        features=draw(features),
        version_spans=draw(tuples(spans)),
        finish_reason=draw(st.sampled_from(["stop", "length", "abort"])),
        text=draw(texts),
        token_entropies=draw(st.none() | floats(size)),
        first_token_s=draw(doubles),
        total_s=draw(doubles),
    )


@st.composite
def questions(draw):
    siblings = draw(tuples(features))
    rewards = draw(st.none() | floats(len(siblings)))
    return types.GroupFeatures(draw(names), draw(names), siblings, rewards)


@st.composite
def labelled_groups(draw):
    siblings = draw(tuples(features))
    rewards = draw(floats(len(siblings)))
    return types.LabelledGroup(
        draw(names), draw(uint64s), draw(names), draw(names), siblings, rewards, draw(st.integers(0, 2**32 - 1))
    )


@st.composite
def group_baselines(draw):
    if draw(booleans):
        return types.GroupBaselines(draw(names), 0, None, None, draw(st.booleans()))
    size = draw(st.integers(1, 3))
    numbers = draw(floats(size)), draw(st.none() | floats(size))
    return types.GroupBaselines(draw(names), draw(uint64s), *numbers, draw(st.booleans()))


@st.composite
def training_rollouts(draw):
    size = draw(st.integers(0, 4))
    return types.TrainingRollout(
        *(draw(rollout_ids), draw(ints(2)), draw(ints(size)), draw(floats(size)), draw(singles), draw(tuples(spans))),
        reward=draw(st.none() | singles),
    )


metrics = st.builds(
    types.StepMetrics,
    *[doubles] * 8,
    uint64s,
    uint32s,
    uint32s,
    st.dictionaries(uint32s, uint32s, max_size=3),
    *[doubles] * 6,
    uint32s,
    uint64s,
    *[doubles] * 3,
    st.floats(),
    doubles,
    st.floats(),
)
replicas = st.builds(types.ReplicaResult, names, uint64s, booleans, texts, doubles, doubles, digests, uint64s)
calibration_bins = st.builds(types.CalibrationBin, doubles, doubles, uint32s)
qualities = st.builds(types.ProbeQuality, uint32s, *[st.floats()] * 8, tuples(calibration_bins))
probes = st.builds(
    types.ProbeStatus, names, uint64s, uint32s, uint32s, uint32s, uint32s, doubles, st.floats(), qualities
)

PAIRS = {
    "adapter": (st.builds(types.Adapter, uint32s, doubles, digests), generation_pb2.WeightsAdapter),
    "rollout_id": (rollout_ids, common_pb2.RolloutId),
    "version_span": (spans, common_pb2.VersionSpan),
    "features": (features, common_pb2.RolloutFeatures),
    "prompt": (prompts, generation_pb2.PromptSpec),
    "sampling": (samplings, generation_pb2.SamplingParams),
    "rollout": (rollouts(), generation_pb2.Rollout),
    "group": (
        st.builds(types.Group, names, ints(2), tuples(rollouts())),
        generation_pb2.StreamTrajectoriesResponse,
    ),
    "encoded_prompt": (
        st.integers(0, 3).flatmap(lambda d: st.builds(types.EncodedPrompt, names, uint32s, floats(d), uint64s)),
        generation_pb2.EncodePromptsResponse,
    ),
    "policy": (
        st.builds(
            types.Policy,
            *(
                names,
                names,
                uint64s,
                digests,
                booleans,
                texts,
                names,
                names,
                uint32s,
                uint32s,
                uint32s,
                uint32s,
                booleans,
                st.sampled_from(["", "nccl", "gloo"]),
                digests,
                uint32s,
            ),
        ),
        generation_pb2.GetPolicyResponse,
    ),
    "prompt_checks": (
        st.lists(st.builds(types.PromptCheck, names, uint32s, texts), max_size=3),
        generation_pb2.CheckPromptsResponse,
    ),
    "weight_update": (
        st.builds(types.WeightUpdate, uint64s, booleans, doubles, doubles),
        generation_pb2.UpdateWeightsResponse,
    ),
    "group_features": (questions(), value_pb2.GroupFeatures),
    "group_baselines": (group_baselines(), value_pb2.GroupBaselines),
    "prompt_features": (
        st.integers(0, 3).flatmap(lambda d: st.builds(types.PromptFeatures, names, names, floats(d))),
        value_pb2.PromptFeatures,
    ),
    "prompt_score": (
        st.builds(types.PromptScore, names, uint64s, singles)
        | names.map(lambda name: types.PromptScore(name, 0, None)),
        value_pb2.PromptScore,
    ),
    "labelled_group": (labelled_groups(), value_pb2.LabelledGroup),
    "probe_report": (
        st.builds(types.ProbeReport, tuples(probes), uint64s, uint64s, uint64s, uint64s),
        value_pb2.GetProbeResponse,
    ),
    "training_rollout": (training_rollouts(), learner_pb2.TrainingRollout),
    "step_metrics": (metrics, learner_pb2.StepMetrics),
    "replica_result": (replicas, learner_pb2.ReplicaResult),
    "step_result": (
        st.builds(
            types.StepResult, uint64s, booleans, metrics, tuples(st.tuples(rollout_ids, reasons)), tuples(replicas)
        ),
        learner_pb2.SubmitAdvantagesResponse,
    ),
    "learner_status": (
        st.builds(
            types.LearnerStatus,
            *(names, uint64s, uint64s, states, uint64s, uint64s, st.dictionaries(reasons, uint64s, max_size=2), names),
            *(uint32s, tuples(replicas), digests, names, booleans),
        ),
        learner_pb2.GetStatusResponse,
    ),
    "model_export": (st.builds(types.ModelExport, texts, uint64s), learner_pb2.ExportModelResponse),
}


def plain(value):
    """Return a value whose arrays and NaNs compare by content."""
    if dataclasses.is_dataclass(value):
        return type(value), [plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return "nan" if isinstance(value, float) and math.isnan(value) else value


def test_every_pair_of_the_codec_is_listed_here():
    encoders = {name.removeprefix("encode_") for name in codec.__all__ if name.startswith("encode_")}
    assert encoders - {"batch_header"} == PAIRS.keys()


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_value_survives_the_wire(name, data):
    strategy, message_class = PAIRS[name]
    value = data.draw(strategy)
    message = getattr(codec, f"encode_{name}")(value)
    back = getattr(codec, f"decode_{name}")(message_class.FromString(message.SerializeToString()))
    assert plain(back) == plain(value)


def test_a_batch_header_counts_its_rollouts():
    batch = types.Batch("run", "step-1", 1, (training_rollout(),) * 3, temperature=0.5)
    message = learner_pb2.BatchHeader.FromString(codec.encode_batch_header(batch).SerializeToString())
    assert codec.decode_batch_header(message) == types.BatchHeader("run", "step-1", 1, 3, 0.5)


def test_what_is_unset_gets_the_documented_default():
    assert codec.decode_sampling(generation_pb2.SamplingParams()) == types.Sampling()
    assert codec.decode_batch_header(learner_pb2.BatchHeader()).temperature == 1.0
    assert codec.decode_group_features(value_pb2.GroupFeatures()).domain == "default"
    prompt = value_pb2.PromptFeatures(prompt_hidden=codec.to_tensor([1.0], "float32"))
    assert codec.decode_prompt_features(prompt).domain == "default"


def test_greedy_is_told_from_unset():
    assert codec.decode_sampling(codec.encode_sampling(types.Sampling(temperature=0.0))).temperature == 0.0


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
def test_a_prompt_that_is_none_is_refused_by_name(content):
    with pytest.raises(CodecError, match="required: text") as caught:
        codec.encode_prompt(types.Prompt("g", content), "prompts[3]")
    assert caught.value.field == "prompts[3].content"


# Messages as a peer should not send them: each starts whole and is spoilt in one place.


def whole_features():
    return codec.encode_features(types.Features(np.ones(3, np.float32), np.ones(3, np.float32)))


def whole_rollout():
    tokens, logprobs = np.arange(2, dtype=np.int32), np.zeros(2, np.float32)
    state = types.Features(np.ones(3, np.float32), np.ones(3, np.float32))
    name = types.RolloutId("run", 0, "g", 0)
    return codec.encode_rollout(types.Rollout(name, tokens, logprobs, state, (), "stop", "", logprobs))


def whole_labels():
    message = value_pb2.LabelledGroup(schema_version=2, run_id="run", group_id="g", rollouts=[whole_features()] * 2)
    message.rewards.CopyFrom(codec.to_tensor([0.0, 1.0], "float32"))
    return message


def whole_question():
    message = value_pb2.GroupFeatures(group_id="g", rollouts=[whole_features()] * 2)
    message.rewards.CopyFrom(codec.to_tensor([0.0, 1.0], "float32"))
    return message


def whole_encoded_prompt():
    return codec.encode_encoded_prompt(types.EncodedPrompt("g", 3, np.ones(3, np.float32), 1))


def whole_prompt_features():
    return codec.encode_prompt_features(types.PromptFeatures("g", "d", np.ones(3, np.float32)))


def whole_score():
    return codec.encode_prompt_score(types.PromptScore("g", 1, 0.5))


def whole_baselines():
    numbers = np.array([0.5, 0.25], np.float32)
    return codec.encode_group_baselines(types.GroupBaselines("g", 1, numbers, numbers))


def training_rollout():
    tokens, logprobs = np.arange(2, dtype=np.int32), np.zeros(2, np.float32)
    return types.TrainingRollout(types.RolloutId("run", 0, "g", 0), tokens, tokens, logprobs, 0.5, ())


def whole_training():
    return codec.encode_training_rollout(training_rollout())


THREE = codec.to_tensor([1.0, 2.0, 3.0], "float32")
CASES = [
    # what is whole, its decoder, the field spoilt, with what (None clears it)
    (whole_features, codec.decode_features, "prompt_hidden", None),
    (whole_features, codec.decode_features, "response_hidden", None),
    (whole_features, codec.decode_features, "response_hidden", codec.to_tensor([1.0], "float32")),
    (whole_rollout, codec.decode_rollout, "token_ids", None),
    (whole_rollout, codec.decode_rollout, "token_ids", codec.to_tensor([1, 2], "int64")),
    (whole_rollout, codec.decode_rollout, "logprobs", None),
    (whole_rollout, codec.decode_rollout, "logprobs", THREE),
    (whole_rollout, codec.decode_rollout, "token_entropies", THREE),
    (whole_rollout, codec.decode_rollout, "finish_reason", None),
    (whole_rollout, codec.decode_rollout, "finish_reason", 77),
    (whole_labels, codec.decode_labelled_group, "schema_version", None),
    (whole_labels, codec.decode_labelled_group, "schema_version", 1),
    (whole_labels, codec.decode_labelled_group, "rewards", None),
    (whole_labels, codec.decode_labelled_group, "rewards", THREE),
    (whole_question, codec.decode_group_features, "rewards", THREE),
    (whole_question, codec.decode_group_features, "rewards", codec.to_tensor([1, 2], "int32")),
    (whole_baselines, codec.decode_group_baselines, "status", None),
    (whole_baselines, codec.decode_group_baselines, "status", 77),
    (whole_baselines, codec.decode_group_baselines, "values", None),
    (whole_baselines, codec.decode_group_baselines, "baselines", THREE),
    (whole_encoded_prompt, codec.decode_encoded_prompt, "prompt_hidden", None),
    (whole_prompt_features, codec.decode_prompt_features, "prompt_hidden", None),
    (whole_prompt_features, codec.decode_prompt_features, "prompt_hidden", codec.to_tensor([1], "int32")),
    (whole_score, codec.decode_prompt_score, "status", None),
    (whole_score, codec.decode_prompt_score, "status", 77),
    (whole_training, codec.decode_training_rollout, "prompt_token_ids", None),
    (whole_training, codec.decode_training_rollout, "token_ids", None),
    (whole_training, codec.decode_training_rollout, "logprobs", None),
    (whole_training, codec.decode_training_rollout, "logprobs", THREE),
]


@pytest.mark.parametrize(("whole", "decode", "field", "spoilt"), CASES)
def test_a_spoilt_message_is_refused_by_the_field(whole, decode, field, spoilt):
    message = whole()
    decode(message, "x[1]")
    if spoilt is None:
        message.ClearField(field)
    elif isinstance(spoilt, int):
        setattr(message, field, spoilt)
    else:
        getattr(message, field).CopyFrom(spoilt)
    with pytest.raises(CodecError) as caught:
        decode(message, "x[1]")
    assert caught.value.field == f"x[1].{field}"


def test_the_path_leads_to_the_sibling_that_is_wrong():
    message = value_pb2.GroupFeatures(group_id="g", rollouts=[whole_features(), whole_features()])
    message.rollouts[1].ClearField("prompt_hidden")
    with pytest.raises(CodecError) as caught:
        codec.decode_group_features(message, "groups[4]")
    assert caught.value.field == "groups[4].rollouts[1].prompt_hidden"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (generation_pb2.PromptSpec(group_id="g"), "p.prompt"),
        (generation_pb2.PromptSpec(group_id="g", chat=generation_pb2.ChatPrompt()), "p.chat"),
        (generation_pb2.PromptSpec(group_id="g", tokens=generation_pb2.TokenPrompt()), "p.tokens"),
    ],
)
def test_a_prompt_that_asks_nothing_is_refused(message, field):
    with pytest.raises(CodecError) as caught:
        codec.decode_prompt(message, "p")
    assert caught.value.field == field


def test_rewards_that_are_not_one_a_rollout_are_not_sent():
    state = types.Features(np.ones(3, np.float32), np.ones(3, np.float32))
    with pytest.raises(CodecError, match="1 elements for 2 rollouts") as caught:
        codec.encode_group_features(types.GroupFeatures("g", "d", (state, state), np.ones(1, np.float32)), "groups[2]")
    assert caught.value.field == "groups[2].rewards"


def test_arrays_of_two_axes_are_not_sent_where_one_is_meant():
    with pytest.raises(CodecError, match="required: 1 axis") as caught:
        codec.encode_features(types.Features(np.ones((1, 3), np.float32), np.ones(3, np.float32)), "z")
    assert caught.value.field == "z.prompt_hidden"
