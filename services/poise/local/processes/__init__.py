"""Supervised processes of a local run."""
