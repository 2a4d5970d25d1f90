"""The mathematics of POISE and of the algorithms it is compared with. Imports numpy only."""
