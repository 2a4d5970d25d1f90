"""Samples and scores groups: service clients, load balancing, scoring, prefetching of steps."""
