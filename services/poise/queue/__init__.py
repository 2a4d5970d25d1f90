"""The labelled-rollout queue: the interface, Redis Streams, in-memory."""
