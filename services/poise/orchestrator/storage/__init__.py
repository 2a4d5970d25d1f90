"""The run folder and the step journal."""
