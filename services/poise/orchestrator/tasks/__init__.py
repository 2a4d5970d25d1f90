"""What a run trains on: where problems come from, and how they are mixed and held out."""
