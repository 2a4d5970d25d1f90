"""Models made or unpacked on this machine, and `poise models check`."""
