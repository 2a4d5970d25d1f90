"""The regression that predicts rewards from features: fitted incrementally on a sliding window of labels."""
