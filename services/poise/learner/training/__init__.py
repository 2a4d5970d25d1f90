"""One training step: packing, losses, gradients, optimizer."""
