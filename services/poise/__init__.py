"""POISE served: online reinforcement learning of language models as microservices over gRPC."""
