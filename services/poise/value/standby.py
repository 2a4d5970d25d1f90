"""Taking the state folder: at once, or by waiting until the replica that holds it is gone.

The folder's lock is the election: the system lets go of it when its holder dies, however it dies. Knows no probe.
"""

from __future__ import annotations

import asyncio
import logging

from poise.value.config import StandbyConfig
from poise.value.relay import Relay
from poise.value.store.folder import StateInUseError, StateStore
from poise.value.store.snapshot import Snapshot
from poise_client import TlsOptions

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.25


class Standby:
    """The waiting of one replica."""

    def __init__(self, config: StandbyConfig, store: StateStore) -> None:
        self._config = config
        self._store = store
        self.relay: Relay | None = None
        """The way to the replica that holds the state; None while this one does, or none is known."""
        self.problem = ""
        """Why calls cannot be passed on now; empty while all is well."""

    async def open_state(self, address: str) -> Snapshot | None:
        """Return the state once the folder is this replica's own; a standby waits for that as long as it takes.

        Raises:
            StateError: see `StateStore.open`.
        """
        while True:
            try:
                saved = await asyncio.to_thread(self._store.open)
            except StateInUseError:
                if not self._config.enabled:
                    raise
                await self._follow()
                await asyncio.sleep(_LOOK_EVERY_S)
            else:
                if self.relay is not None:
                    logger.warning("the value service at %s let go of the state: taking over", self.relay.target)
                if self._config.enabled:
                    await asyncio.to_thread(self._store.announce, self._config.address or address)
                return saved

    async def end(self) -> None:
        """Pass nothing on any more."""
        relay, self.relay = self.relay, None
        if relay is not None:
            await relay.close()

    async def _follow(self) -> None:
        """Find the way to the holder, and see whether it is open."""
        holder = await asyncio.to_thread(self._store.holder)
        if holder is None:
            return
        if self.relay is None or self.relay.target != holder:
            logger.info("standing by: the value service at %s holds the state", holder)
            before, self.relay = self.relay, Relay(holder, self._tls())
            if before is not None:
                await before.close()
        is_serving = await self.relay.is_serving()
        self.problem = "" if is_serving else f"the value service at {holder}, which holds the state, is not ready"

    def _tls(self) -> TlsOptions | None:
        config = self._config
        return None if config.ca_file is None else TlsOptions(config.ca_file, server_name=config.server_name)
