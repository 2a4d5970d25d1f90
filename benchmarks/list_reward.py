"""The verifier of `compare_harder.py`. It imports nothing, because every verifier process loads it."""

from __future__ import annotations


def score(response: str, answer: str) -> float:
    """Return 1 for the exact list; otherwise half the share of entries at the right position.

    Entries are separated by commas; without commas they are characters.
    """
    found, wanted = (
        [each.strip() for each in text.strip().split(",")] if "," in answer else list(text.strip())
        for text in (response, answer)
    )
    if found == wanted:
        return 1.0
    return 0.5 * sum(one == other for one, other in zip(found, wanted, strict=False)) / max(len(found), len(wanted))
