"""Weight updates of a running vLLM model."""
