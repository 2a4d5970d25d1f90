"""Prompts to token ids: chat templates, the tokenizer, and limits on both."""
