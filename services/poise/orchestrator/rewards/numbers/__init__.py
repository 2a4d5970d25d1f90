"""Read the numbers that people and models write, and compare them."""
