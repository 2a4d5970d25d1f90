"""The SDK of POISE served: numpy in, numpy out; async clients and their blocking twins. See docs/sdk.md.

The nouns are in `poise_client.types`, the exceptions in `poise_client.errors`.
"""

from poise_client import _fork  # noqa: F401 (first: it loads gRPC)

# isort: split
from poise_client._channel import KEEPALIVE_OPTIONS, TlsOptions, open_channel
from poise_client._generation import AsyncGenerationClient
from poise_client._learner import AsyncLearnerClient
from poise_client._retry import RetryPolicy
from poise_client._sync import GroupStream
from poise_client._sync_clients import GenerationClient, LearnerClient, ValueClient
from poise_client._token import TokenFile, check_token
from poise_client._tracing import TRACEPARENT, TRACEPARENT_KEY
from poise_client._value import AsyncValueClient
from poise_client._weights import WeightPush, combine_digests, hash_weights, weights_digest

__all__ = [
    "KEEPALIVE_OPTIONS",
    "TRACEPARENT",
    "TRACEPARENT_KEY",
    "AsyncGenerationClient",
    "AsyncLearnerClient",
    "AsyncValueClient",
    "GenerationClient",
    "GroupStream",
    "LearnerClient",
    "RetryPolicy",
    "TlsOptions",
    "TokenFile",
    "ValueClient",
    "WeightPush",
    "check_token",
    "combine_digests",
    "hash_weights",
    "open_channel",
    "weights_digest",
]
