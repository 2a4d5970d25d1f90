"""The supervised processes of a local run."""
