"""Names of the keys that belong to a stream. Pure."""

from __future__ import annotations

import re


def dead_letter_key(stream: str) -> str:
    """Return the key of a stream's dead letters: in a cluster it hashes to the slot of the stream.

    Raises:
        ValueError: no such key exists for this name.
    """
    key = f"{stream}:dead" if _hashed(stream) != stream else f"{{{stream}}}:dead"
    if _hashed(key) != _hashed(stream):
        raise ValueError("braces may only surround the part of the name that a cluster hashes, as in {poise}:labels")
    return key


def _hashed(key: str) -> str:
    """Return the part of a key that a cluster hashes: within the first braces, unless they are empty."""
    found = re.search(r"\{([^}]*)\}", key)
    return found[1] if found and found[1] else key
