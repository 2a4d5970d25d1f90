"""Bringing every version of the policy to the generation replicas."""
