"""The sliding window of labelled groups that one domain's probe is fitted on.

Owns which groups are in it. Knows neither ids seen before nor probes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

import numpy as np

from poise.value.probe.features import FeatureRows, Floats, LabelledRows


class Window:
    """Whole groups, oldest first, of at most `max_rows` rows: siblings enter and leave together."""

    def __init__(self, max_rows: int, groups: Iterable[LabelledRows] = (), num_added: int = 0) -> None:
        """Restore from `groups`, oldest first, of which `num_added` in all were ever added."""
        self._max_rows = max_rows
        self._groups = deque(groups)
        self.num_rows = sum(len(group.rows) for group in self._groups)
        self.num_added = num_added
        """Groups ever added: the clock by which a probe is out of date."""
        self.support = len(self._groups)
        """Groups of the window's width less those of others, since it was empty: see `outvoted`."""
        self._slide()

    def add(self, group: LabelledRows) -> None:
        """Append a group; the oldest leave."""
        self._groups.append(group)
        self.num_rows += len(group.rows)
        self.num_added += 1
        self.support += 1
        self._slide()

    def _slide(self) -> None:
        while self.num_rows > self._max_rows and len(self._groups) > 1:
            self.num_rows -= len(self._groups.popleft().rows)

    def without(self, unwanted: Collection[LabelledRows]) -> Window:
        """Return a window of the other groups, numbered afresh, as stored pieces are named by these numbers."""
        unwanted_ids = {id(group) for group in unwanted}
        kept = [group for group in self._groups if id(group) not in unwanted_ids]
        return Window(self._max_rows, kept, self.num_added + len(kept))

    def outvoted(self) -> bool:
        """Count a group of another width against the window's; whether as many of others have come as of its own.

        Of all widths the one that most groups have is thus what stays, if it has more than all others together (the
        vote of Boyer and Moore), whatever the first group had.
        """
        self.support -= 1
        return self.support <= 0

    @property
    def groups(self) -> tuple[LabelledRows, ...]:
        """The groups now, oldest first: a copy that later additions do not change."""
        return tuple(self._groups)

    @property
    def width(self) -> int | None:
        """The model's width; None while empty."""
        return self._groups[0].rows.width if self._groups else None


def training_rows(groups: Iterable[LabelledRows]) -> tuple[FeatureRows, Floats]:
    """Return inputs and targets of groups, to be fitted on. Needs at least one group."""
    listed = list(groups)
    return (
        FeatureRows.concatenate([group.inputs for group in listed]),
        np.concatenate([group.targets for group in listed]),
    )
