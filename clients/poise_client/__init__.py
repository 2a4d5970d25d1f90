"""SDK of POISE served: typed clients, async and blocking, with numpy arrays. See docs/sdk.md.

`connect` opens all three services, for training runs; each client offers every call of one service. The dataclasses are
in `poise_client.types`, the exceptions in `poise_client.errors`.
"""

from poise_client import _transport  # noqa: F401 (first: it loads gRPC)

# isort: split
from poise_client._connect import AsyncServices, Services, connect, connect_async
from poise_client._generation import AsyncGenerationClient
from poise_client._learner import AsyncLearnerClient
from poise_client._run import AsyncRun
from poise_client._sync_clients import GenerationClient, LearnerClient, Run, ValueClient
from poise_client._transport.channel import TlsOptions, open_channel
from poise_client._transport.client import ClientOptions
from poise_client._transport.retry import RetryPolicy
from poise_client._transport.sync import GroupStream
from poise_client._transport.token import TokenFile
from poise_client._transport.tracing import TRACEPARENT
from poise_client._value import AsyncValueClient
from poise_client._weights import WeightPush, combine_digests, hash_weights, weights_digest

__all__ = [
    "TRACEPARENT",
    "AsyncGenerationClient",
    "AsyncLearnerClient",
    "AsyncRun",
    "AsyncServices",
    "AsyncValueClient",
    "ClientOptions",
    "GenerationClient",
    "GroupStream",
    "LearnerClient",
    "RetryPolicy",
    "Run",
    "Services",
    "TlsOptions",
    "TokenFile",
    "ValueClient",
    "WeightPush",
    "combine_digests",
    "connect",
    "connect_async",
    "hash_weights",
    "open_channel",
    "weights_digest",
]
