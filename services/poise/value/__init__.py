"""The value service: baselines from a probe that learns online from labelled rollouts."""
