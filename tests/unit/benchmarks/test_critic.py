"""The critic values a batch like single prompts, and training distinguishes prompts."""

import numpy as np
import pytest
import torch
from benchmarks.critic import Critic, train
from tests.support.tiny_models import make_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return str(make_tiny_llama(tmp_path_factory.mktemp("tiny")))


def prompts(*lengths: int) -> list[np.ndarray]:
    source = np.random.default_rng(0)
    return [source.integers(5, 100, length).astype(np.int32) for length in lengths]


def test_padding_does_not_change_a_prompts_value(folder: str) -> None:
    critic = Critic(folder, 0.3)
    torch.nn.init.normal_(critic.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    batch = prompts(3, 17, 9)
    with torch.no_grad():
        single = [float(torch.sigmoid(critic([prompt])[0])) for prompt in batch]
    np.testing.assert_allclose(critic.values(batch), single, rtol=1e-4)
    assert np.ptp(single) > 0.01


def test_critic_starts_at_the_mean_reward(folder: str) -> None:
    np.testing.assert_allclose(Critic(folder, 0.3).values(prompts(4, 8)), 0.3, rtol=1e-5)


def test_critic_learns_which_prompts_are_rewarded(folder: str) -> None:
    asked = [np.array([7, 8, 9, kind], np.int32) for kind in (20, 21)]
    trained = train(folder, asked * 40, np.array([0.9, 0.1] * 40, np.float32), asked, num_epochs=8)
    assert len(trained.values) == len(trained.seconds) == 8
    good, bad = trained.values[-1]
    assert good - bad > 0.3
