"""A training loop of your own, with one rollout of each prompt. `poise status --preset tiny` shows the addresses.

poise up --preset tiny --set train.algorithm.estimator=score_prefix
POISE_TOKEN_FILE=runs/tiny/services/token python docs/custom_loop.py GENERATION VALUE LEARNER [STEPS]
"""

import random
import sys
import uuid

import poise_client
from poise_client.types import Sampling


def train(run: poise_client.Run, num_steps: int) -> None:
    for step in range(num_steps):
        digits = [f"{random.Random(f'{step}/{index}').randrange(1000):03d}" for index in range(64)]
        sampling = Sampling(max_tokens=4, seed=step)
        groups = run.sample(step, [f"max{number}=" for number in digits], num_rollouts=1, sampling=sampling)
        rewards = [float(group.rollouts[0].text == max(number)) for group, number in zip(groups, digits)]
        baselines = run.baselines(groups, rewards)  # before any label of the step is published
        run.publish(baselines)
        result = run.train(baselines)
        print(f"step {step}: reward {sum(rewards) / 64:.3f}, policy version {result.policy_version}", flush=True)


if __name__ == "__main__":
    generation, value, learner, *steps = sys.argv[1:]
    with poise_client.connect(generation=generation, value=value, learner=learner) as services:
        run_id = f"custom-loop-{uuid.uuid4().hex[:8]}"  # a new name: the services train on each rollout only once
        train(services.run(run_id, domain="max"), int(steps[0]) if steps else 20)
