"""A complete training loop of your own, against `poise up --preset tiny`; `poise status --preset tiny` shows the ports.

POISE_TOKEN_FILE=runs/tiny/services/token python docs/custom_loop.py GENERATION VALUE LEARNER [STEPS]    each host:port
"""

import random
import sys
import uuid

import numpy as np

from poise_client import GenerationClient, LearnerClient, ValueClient
from poise_client.types import Batch, GroupFeatures, LabelledGroup, Prompt, Sampling, TrainingRollout

RUN = f"custom-loop-{uuid.uuid4().hex[:8]}"  # a run of its own: what a name was used for is never learnt again
PROMPTS = 32


def question(source: random.Random) -> tuple[str, str]:
    digits = f"{source.randrange(1000):03d}"
    return f"max{digits}=", max(digits)


def train(generation: GenerationClient, value: ValueClient, learner: LearnerClient, num_steps: int) -> None:
    for step in range(num_steps):
        source = random.Random(step)
        asked = {f"g{i}": question(source) for i in range(PROMPTS)}
        prompts = [Prompt(name, prompt) for name, (prompt, _) in asked.items()]
        sampling = Sampling(max_tokens=4, seed=step)
        groups = [*generation.stream_trajectories(RUN, step, prompts, num_rollouts=2, sampling=sampling)]
        rewards = [np.float32([r.text == asked[g.group_id][1] for r in g.rollouts]) for g in groups]
        mean = float(np.mean(rewards))

        # Baselines first: once a step's labels are published, its baselines can no longer be asked for.
        features = [
            GroupFeatures(g.group_id, "max", tuple(r.features for r in g.rollouts), reward)
            for g, reward in zip(groups, rewards)
        ]
        answers = value.estimate_baselines(RUN, step, features)
        labels = [
            LabelledGroup(RUN, step, f.group_id, f.domain, f.rollouts, r, num_rollouts=2)
            for f, r in zip(features, rewards)
        ]
        value.publish_labels(labels)

        rollouts = []
        for group, answer, reward in zip(groups, answers, rewards):
            baseline = reward[::-1] if answer.baselines is None else answer.baselines  # RLOO until there is a probe
            for r, advantage in zip(group.rollouts, reward - baseline):
                ids = group.prompt_token_ids, r.token_ids
                rollouts.append(TrainingRollout(r.id, *ids, r.logprobs, float(advantage), r.version_spans))
        result = learner.submit_advantages(Batch(RUN, f"step-{step}", step, tuple(rollouts)))
        print(f"step {step}: reward {mean:.3f}, policy version {result.policy_version}", flush=True)


if __name__ == "__main__":
    addresses, steps = sys.argv[1:4], int(sys.argv[4]) if len(sys.argv) > 4 else 20
    with GenerationClient(addresses[0]) as g, ValueClient(addresses[1]) as v, LearnerClient(addresses[2]) as t:
        train(g, v, t, steps)
