"""Exit statuses of every program: `poise`, `python -m poise.<service>` and the training loop.

Whoever starts a program again goes by them: the local supervisor, and the chart's Job through its podFailurePolicy.
"""

from __future__ import annotations

OK = 0
"""It did what it was asked for."""
FAILED = 1
"""It failed, and may succeed when it is started again."""
WRONG_SETTINGS = 2
"""It fails again until somebody changes an option, a setting, or the file or service that a setting names."""
INTERRUPTED = 130
"""A signal ended it; started again, it resumes."""
