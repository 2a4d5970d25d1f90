"""Atomic files, scratch folders, and the cache folder."""
