"""ValueService on the wire of any replica: its own answers where it holds the state, the holder's where it waits."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message

from poise.errors import BackendDown
from poise.value.relay import was_relayed
from poise.value.servicer import Context, ValueServicer
from poise.value.standby import Standby
from poise_proto.v1 import value_pb2 as pb
from poise_proto.v1 import value_pb2_grpc


class ValueGateway(value_pb2_grpc.ValueServiceServicer):
    """Asks `own`, or, while this replica stands by, the holder."""

    def __init__(self, own: ValueServicer, standby: Standby) -> None:
        self._own = own
        self._standby = standby

    async def EstimateBaselines(  # noqa: N802
        self, request: pb.EstimateBaselinesRequest, context: Context
    ) -> pb.EstimateBaselinesResponse:
        """See value.proto."""
        answer: pb.EstimateBaselinesResponse = await self._ask("EstimateBaselines", request, context)
        return answer

    async def ScorePrompts(  # noqa: N802
        self, request: pb.ScorePromptsRequest, context: Context
    ) -> pb.ScorePromptsResponse:
        """See value.proto."""
        answer: pb.ScorePromptsResponse = await self._ask("ScorePrompts", request, context)
        return answer

    async def PublishLabels(  # noqa: N802
        self, request: pb.PublishLabelsRequest, context: Context
    ) -> pb.PublishLabelsResponse:
        """See value.proto."""
        answer: pb.PublishLabelsResponse = await self._ask("PublishLabels", request, context)
        return answer

    async def GetProbe(self, request: pb.GetProbeRequest, context: Context) -> pb.GetProbeResponse:  # noqa: N802
        """See value.proto."""
        answer: pb.GetProbeResponse = await self._ask("GetProbe", request, context)
        return answer

    async def _ask(self, method: str, request: Message, context: Context) -> Any:
        relay = self._standby.relay
        if relay is None:
            return await getattr(self._own, method)(request, context)
        if was_relayed(context):
            raise BackendDown("this replica does not hold the state any more", remedy="Try again.", retry_after_s=0.5)
        return await relay.pass_on(method, request, context)
