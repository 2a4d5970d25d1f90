"""The models in training: policy, critic, reference, and their forward pass."""
