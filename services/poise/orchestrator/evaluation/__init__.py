"""Evaluation on held-out prompts, during a run and by `poise eval`."""
