"""`poise compare`: several algorithms and seeds under one budget, one run after another on this machine."""
