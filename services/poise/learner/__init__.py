"""The learner service: trains the policy on rollouts with advantages, and publishes each new version."""
