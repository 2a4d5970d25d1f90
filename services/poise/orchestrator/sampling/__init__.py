"""From problems to scored groups: service clients, load balancing, scoring, prefetching of steps."""
