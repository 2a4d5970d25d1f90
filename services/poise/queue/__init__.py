"""The queue of labelled groups: the interface, and the implementation on Redis Streams."""
