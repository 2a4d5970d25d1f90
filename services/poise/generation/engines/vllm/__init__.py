"""The `vllm` engine: AsyncLLM in child processes with our recorder in its workers."""
