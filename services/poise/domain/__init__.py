"""Pure mathematics of POISE: features, baselines, advantages, staleness. Knows numpy alone."""
