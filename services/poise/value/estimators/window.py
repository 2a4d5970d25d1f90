"""The sliding window of labels that one domain's estimator is fitted on."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

from poise.value.estimators.features import Label


class Window:
    """The newest labels, at most `max_rows` rows. Groups enter and leave whole."""

    def __init__(self, max_rows: int, groups: Iterable[Label] = (), num_added: int = 0) -> None:
        """Restore a window from its groups, oldest first, and the number of groups ever added."""
        self._max_rows = max_rows
        self._groups = deque(groups)
        self.num_rows = sum(len(group.features) for group in self._groups)
        self.num_added = num_added
        """Groups ever added. A probe is outdated when this number exceeds the one it was fitted at."""
        self._majority = len(self._groups)
        self.width = next((group.features.width for group in self._groups if group.features.width), 0)
        """Width of the hidden states; 0 while no label has one."""
        self._slide()

    def add(self, group: Label) -> None:
        """Append a group and drop the oldest ones that no longer fit."""
        self._groups.append(group)
        self.width = self.width or group.features.width
        self.num_rows += len(group.features)
        self.num_added += 1
        self._majority += 1
        self._slide()

    def _slide(self) -> None:
        while self.num_rows > self._max_rows and len(self._groups) > 1:
            self.num_rows -= len(self._groups.popleft().features)

    def without(self, unwanted: Collection[Label]) -> Window:
        """Return a window of the other groups. Groups get new numbers, because the store finds groups by number."""
        unwanted_ids = {id(group) for group in unwanted}
        kept = [group for group in self._groups if id(group) not in unwanted_ids]
        return Window(self._max_rows, kept, self.num_added + len(kept))

    def vote_against_width(self) -> bool:
        """Count a group of another width; return whether such groups are now at least as many as the window's own.

        This is the majority vote of Boyer and Moore: the width of more than half of all groups wins, regardless of the
        first group's width.
        """
        self._majority -= 1
        return self._majority <= 0

    @property
    def groups(self) -> tuple[Label, ...]:
        """A copy of the current groups, oldest first."""
        return tuple(self._groups)
