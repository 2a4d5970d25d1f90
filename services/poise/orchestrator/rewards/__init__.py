"""Rewards: verifiers give each response a reward in [0, 1], in processes of their own."""
