"""The training step: packing, losses, gradients, optimizer."""
