"""The estimators of baselines, and the windows, pins and diagnostics that all of them share."""
