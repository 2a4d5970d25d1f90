"""The `torch` engine, on transformers: exact and slow, the reference for tests."""
