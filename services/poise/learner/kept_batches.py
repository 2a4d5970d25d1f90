"""Batches kept for inspection: whose loss or gradient was not finite, and those on which training failed for good.

<folder>/batch-00000042.pb      as it came; `poise_client.codec.load_batch` reads it
"""

from __future__ import annotations

import logging
from pathlib import Path

from poise.runtime.files.atomic import write_file

logger = logging.getLogger(__name__)


class KeptBatches:
    """One folder, of the last few."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def save(self, sequence: int, content: bytes) -> Path | None:
        """Keep a batch by its number, and drop all but the newest; None where it cannot be written, which is logged."""
        path = self.folder / f"batch-{sequence:08d}.pb"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(path, content)
            for old in sorted(self.folder.glob("batch-*.pb"))[: -self._keep]:
                old.unlink(missing_ok=True)
        except OSError as error:
            logger.error("%s cannot be written: %s", path, error)
            return None
        return path
