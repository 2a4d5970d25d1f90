"""Labels are learnt exactly once despite kill -9. `benchmarks/value_chaos.py` repeats the test fifty times."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.integration.value.chaos import GROUPS_A_MESSAGE, MESSAGES_A_ROUND, PHASES, run_chaos

from poise_client.types import Estimator


@pytest.mark.parametrize("estimator", ["probe", "score_prefix"])
async def test_every_label_is_learnt_once_despite_kills(tmp_path: Path, estimator: Estimator) -> None:
    outcome = await run_chaos(tmp_path, num_rounds=5, seed=3, estimator=estimator)
    assert len(outcome.published) == 5 * MESSAGES_A_ROUND * GROUPS_A_MESSAGE
    assert outcome.kills["value"] and outcome.kills["valkey"] and outcome.kills["both"]
    assert sum(outcome.hits[phase] for phase in PHASES) >= 4
    assert not outcome.lost
    assert not outcome.doubled
    assert set(outcome.learnt) == outcome.consumed == outcome.published
