"""The generation service: samples rollouts, with features from the same forward passes."""
