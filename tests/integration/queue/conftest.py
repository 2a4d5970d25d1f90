from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.redis_servers import RedisServers, running_servers


@pytest.fixture
def servers() -> Iterator[RedisServers]:
    with running_servers() as running:
        yield running
