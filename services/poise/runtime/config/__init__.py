"""Typed settings: reading, merging, checking and printing them."""
