"""Makes labels and settings for the tests of the value service."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.support.groups import make_group

from poise.value.config import ValueConfig
from poise.value.estimators.features import NUM_ENTROPIES, FeatureMatrix, GroupQuery, Label
from poise_client.codec import encode
from poise_client.types import EntropyStats, Features
from poise_proto.v1 import value_pb2

WIDTH = 6


class Maker:
    """Random features, and rewards that depend on them, from one seed."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)

    def features(self, n: int = 2, width: int = WIDTH) -> FeatureMatrix:
        def floats(columns: int) -> np.ndarray:
            return self.random.normal(size=(n, columns)).astype(np.float32)

        return FeatureMatrix(floats(width), floats(width), np.abs(floats(NUM_ENTROPIES)))

    def label(
        self,
        step: int,
        group_id: str = "g0",
        *,
        run_id: str = "run",
        domain: str = "default",
        n: int = 2,
        width: int = WIDTH,
        features: FeatureMatrix | None = None,
    ) -> Label:
        features = self.features(n, width) if features is None else features
        rewards = 1 / (1 + np.exp(-features.prompt_hidden[:, 0]))
        return Label(run_id, step, group_id, domain, features, rewards.astype(np.float32))

    def message(self, label: Label) -> value_pb2.LabelledGroup:
        """Return a serialised label."""
        ids = {"run_id": label.run_id, "step": label.step, "domain": label.domain}
        group = make_group(label.group_id, sdk_features(label.features), label.rewards, **ids)
        return encode(group, value_pb2.LabelledGroup)

    def payload(self, step: int, group_id: str = "g0", **options: object) -> bytes:
        return self.message(self.label(step, group_id, **options)).SerializeToString()

    def query(self, group_id: str = "q", *, domain: str = "default", n: int = 2, width: int = WIDTH) -> GroupQuery:
        return GroupQuery(group_id, domain, self.features(n, width))

    def rewards(self, n: int = 2) -> np.ndarray:
        return self.random.uniform(size=n).astype(np.float32)


def sdk_features(rows: FeatureMatrix) -> tuple[Features, ...]:
    """Return features in the client's types."""
    return tuple(
        Features(prompt, response, *(EntropyStats(*entropies[i : i + 4].tolist()) for i in (0, 4, 8)))
        for prompt, response, entropies in zip(rows.prompt_hidden, rows.response_hidden, rows.entropies, strict=True)
    )


@pytest.fixture
def make() -> Maker:
    return Maker()


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., ValueConfig]:
    def build(**changes: object) -> ValueConfig:
        probe = {"warmup_steps": 2, "min_rows": 4, "alpha": 1.0} | changes.pop("probe", {})  # type: ignore[operator]
        return ValueConfig(**{"state_dir": tmp_path / "state", "probe": probe} | changes)

    return build
