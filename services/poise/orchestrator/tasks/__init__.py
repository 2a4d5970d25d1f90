"""Tasks: sources of problems, the mixture of tasks, and the split of held-out problems."""
