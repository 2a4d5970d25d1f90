"""Publishes every policy version to the generation replicas."""
