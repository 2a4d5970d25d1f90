"""POISE served: online reinforcement learning of language models as microservices over gRPC."""

__version__ = "0.1.0"
