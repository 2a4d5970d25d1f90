"""The `torch` engine: transformers, exact and slow, the reference of the tests."""
