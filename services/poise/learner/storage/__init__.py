"""The learner's durable state: journal, checkpoints, exports."""
