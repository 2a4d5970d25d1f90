"""The value service: baselines from estimators that learn online from labelled rollouts."""
