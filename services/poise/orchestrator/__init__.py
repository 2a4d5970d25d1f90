"""The orchestrator: drives the services through training steps, and records what happened."""
