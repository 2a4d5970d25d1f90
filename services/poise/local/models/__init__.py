"""Models that can be created on this machine, and `poise models check`."""
