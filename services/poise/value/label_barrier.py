"""Waits until a run's probes are fitted on every label that was published before a request.

The probe that a step is pinned to then depends only on the labels, not on timing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Mapping

from poise.errors import BackendDown
from poise.value.state import ValueState
from poise.value.updater import Updater


async def wait_for_labels(
    updater: Updater, run_id: str, domains: Collection[str], limit_s: float
) -> frozenset[str] | None:
    """Return the domains whose probes have not seen every label published so far.

    Returns None if some of these labels are not learnt and saved yet, so that any domain may be behind. The answer is
    valid until the caller yields.

    Waits for fits of the requested domains and of all domains with labels of the run, because a later request of the
    same step may need those. Does not wait for domains of other runs. Returns when all these domains are fitted, when
    no further fit will start, or after `limit_s`. While the queue is unreachable, it keeps waiting.
    """
    state = updater.state
    published: dict[str, int] | None = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            if not await _wait_until_learnt(updater):
                return None
            # Later labels do not count: those of other runs could delay this request forever.
            published = {name: domain.window.num_added for name, domain in state.domains.items()}
            own = {*domains, *state.domains_of_run(run_id)}
            await _wait_until_fitted(updater, {name: number for name, number in published.items() if name in own})
    return None if published is None else _behind(state, published)


async def _wait_until_learnt(updater: Updater) -> bool:
    """Wait until the labels published so far are learnt and saved; return False if consumption halts."""
    is_newest_known, newest = False, None
    while True:
        change = updater.next_change()
        try:
            if not is_newest_known:
                newest, is_newest_known = await updater.queue.newest_unacked(), True
            if newest is None or not await updater.queue.has_unacked_up_to(newest):
                return True
        except BackendDown:
            pass  # the updater reports it and retries
        if updater.halted:
            return False
        await change.wait()


async def _wait_until_fitted(updater: Updater, published: Mapping[str, int]) -> None:
    """Wait until every domain is fitted, except those for which no fit will follow."""
    while True:
        change = updater.next_change()
        if all(updater.will_not_fit(name) for name in _behind(updater.state, published)):
            return
        await change.wait()


def _behind(state: ValueState, published: Mapping[str, int]) -> frozenset[str]:
    """Return the domains whose probes have not seen the first `published[domain]` groups of their windows."""
    return frozenset(name for name, num_added in published.items() if state.is_due(name, num_added))
