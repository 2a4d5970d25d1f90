"""Rewards: verifiers score each response in [0, 1], in separate processes."""
