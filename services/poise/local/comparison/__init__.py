"""`poise compare`: train with several algorithms and seeds under one budget, one run after another."""
