import contextlib
from collections.abc import Callable, Iterator

import pytest
from tests.integration.runtime.process import Stage, run_stage


@pytest.fixture
def stage(tmp_path_factory) -> Iterator[Callable[..., Stage]]:
    """Start processes for one test."""
    with contextlib.ExitStack() as running:
        yield lambda *settings, **options: running.enter_context(
            run_stage(tmp_path_factory.mktemp("stage"), *settings, **options)
        )
