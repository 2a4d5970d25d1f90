"""From problems to scored rollouts: service clients, load balancing, rewards, baselines."""
