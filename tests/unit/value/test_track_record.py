from __future__ import annotations

import math

import numpy as np
import pytest

from poise.value.track_record import TrackRecord


def test_quality_is_unknown_before_the_first_row() -> None:
    record = TrackRecord(10)
    assert math.isnan(record.pearson())
    assert math.isnan(record.brier())


def test_quality_is_over_all_rows_added() -> None:
    record = TrackRecord(10)
    record.add(np.array([0.1, 0.5], np.float32), np.array([0.0, 1.0], np.float32))
    record.add(np.array([0.9], np.float32), np.array([1.0], np.float32))
    assert record.brier() == pytest.approx((0.01 + 0.25 + 0.01) / 3, rel=1e-5)
    assert record.pearson() == pytest.approx(np.corrcoef([0.1, 0.5, 0.9], [0, 1, 1])[0, 1], rel=1e-5)


def test_only_the_last_rows_count() -> None:
    record = TrackRecord(2)
    record.add(np.array([1, 1, 0.5], np.float32), np.array([0, 0.5, 0.5], np.float32))
    assert len(record) == 2
    assert record.brier() == pytest.approx(0.125)
