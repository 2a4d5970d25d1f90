"""Training over several processes with torch.distributed."""
