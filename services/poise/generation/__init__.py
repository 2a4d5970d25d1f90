"""The generation service: rollouts, with the features of the very passes that produced them."""
