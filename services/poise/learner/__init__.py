"""The learner service: advantages in, policy versions out."""
