"""Score-weighted estimators: regressions of the reward on what is known before each token is sampled."""
