"""Which push may follow which version."""

import pytest

from poise.errors import Conflict
from poise.generation.served_policy import ServedPolicy, must_apply

BASE = ServedPolicy()
SERVED = ServedPolicy("a", 5, b"x" * 32)


@pytest.mark.parametrize(
    ("served", "pushed", "outcome"),
    [
        (BASE, ServedPolicy("a", 0, b"x" * 32), True),
        (BASE, ServedPolicy("a", 7, b"x" * 32), True),
        (SERVED, ServedPolicy("a", 5, b"x" * 32), False),
        (SERVED, ServedPolicy("a", 5, b"y" * 32), Conflict),
        (SERVED, ServedPolicy("a", 4, b"x" * 32), Conflict),
        (SERVED, ServedPolicy("a", 4, b"y" * 32), Conflict),
        (SERVED, ServedPolicy("a", 6, b"x" * 32), True),
        (SERVED, ServedPolicy("a", 60, b"y" * 32), True),
        (SERVED, ServedPolicy("b", 5, b"x" * 32), True),
        (SERVED, ServedPolicy("b", 0, b"y" * 32), True),
    ],
)
def test_push_is_applied_rejected_or_already_served(
    served: ServedPolicy, pushed: ServedPolicy, outcome: bool | type[Exception]
) -> None:
    if isinstance(outcome, bool):
        assert must_apply(served, pushed) is outcome
    else:
        with pytest.raises(outcome) as caught:
            must_apply(served, pushed)
        assert f"version {pushed.policy_version}" in str(caught.value)
        assert "learner" in caught.value.remedy
