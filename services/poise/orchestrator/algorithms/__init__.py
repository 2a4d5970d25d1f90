"""How rewards become advantages: POISE and its rivals, behind one interface."""
