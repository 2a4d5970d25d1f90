"""Files of a run: its folder, the journal of sampled steps, retries while the disk fails."""
