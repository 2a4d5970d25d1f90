"""How rewards become advantages: POISE and the algorithms it is compared with, behind one interface."""
