"""How responses earn their rewards: rules, and the processes that apply them."""
