import contextlib
from collections.abc import Callable, Iterator

import pytest
from tests.integration.runtime.process import Stage, run_stage


@pytest.fixture
def stage(tmp_path_factory) -> Iterator[Callable[..., Stage]]:
    """Starts processes of the test's own."""
    with contextlib.ExitStack() as running:
        yield lambda *settings, **options: running.enter_context(
            run_stage(tmp_path_factory.mktemp("stage"), *settings, **options)
        )
