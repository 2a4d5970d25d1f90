"""Reads numbers as people and models write them, and compares them."""
