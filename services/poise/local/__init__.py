"""Runs on one machine: run.yaml, the processes with an embedded Valkey, models to start with."""
