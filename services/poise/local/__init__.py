"""Run POISE on one machine: run.yaml, supervised processes with an embedded Valkey, small models."""
