"""Hide packages that slow down the import of transformers."""

from __future__ import annotations

import sys

UNUSED = ("scipy", "sklearn")
"""transformers imports these if installed, for losses and metrics that no service uses: a second and 60 MB."""


def hide_unused_packages() -> None:
    """Make scipy and scikit-learn look absent in this process; call it first in a program, never in a library."""
    for name in UNUSED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
