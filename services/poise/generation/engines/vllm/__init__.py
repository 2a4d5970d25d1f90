"""The `vllm` engine: AsyncLLM in child processes, with a recorder of hidden states in its workers."""
