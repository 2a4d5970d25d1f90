"""Addresses, name resolution, certificates, tokens, and process groups that broadcast bytes."""
