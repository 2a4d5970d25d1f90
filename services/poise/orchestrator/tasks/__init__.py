"""Tasks: where problems come from, how tasks are mixed, and which problems are held out for evaluation."""
