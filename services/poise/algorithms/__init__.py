"""The mathematics of POISE and its rivals, in numpy: features, baselines, trackers, advantages, staleness."""
