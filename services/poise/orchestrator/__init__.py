"""The orchestrator: runs the training loop as a client of the three services, and records the results."""
