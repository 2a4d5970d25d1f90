"""The admin routes `/admin/v1/dead-letters`: list, replay and discard labels that could not be learnt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query
from google.protobuf.message import DecodeError
from pydantic import BaseModel, ConfigDict, Field

from poise.queue.interface import DeadLetter, LabelQueue
from poise_proto.v1 import value_pb2

MAX_LETTERS = 1000
"""Maximum dead letters per request."""


class Letters(BaseModel):
    """Ids of dead letters."""

    model_config = ConfigDict(extra="forbid")

    ids: list[Annotated[str, Field(max_length=64)]] = Field(
        min_length=1, max_length=MAX_LETTERS, description="The `id` of each, as listed."
    )


def dead_letter_routes(queue: Callable[[], LabelQueue]) -> APIRouter:
    """Return the routes. `queue` returns the current queue, or raises if the service is not ready."""
    router = APIRouter(prefix="/dead-letters")

    @router.get("", summary="List the newest dead letters, newest first.")
    async def listed(limit: Annotated[int, Query(ge=1, le=MAX_LETTERS)] = 20) -> list[dict[str, Any]]:
        return [_facts(letter) for letter in await queue().dead_letters(max_entries=limit)]

    @router.post("/replay", summary="Move dead letters back to the queue: all of them, or none.")
    async def replay(letters: Letters) -> dict[str, int]:
        await queue().replay(letters.ids)
        return {"num_replayed": len(set(letters.ids))}

    @router.post("/discard", summary="Delete dead letters permanently.")
    async def discard(letters: Letters) -> dict[str, int]:
        return {"num_discarded": await queue().discard(letters.ids)}

    return router


def _facts(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.letter_id,
        "entry_id": letter.entry_id,
        "reason": letter.reason,
        "num_bytes": len(letter.payload),
        "is_whole": letter.is_whole,
        "group": _group_facts(letter.payload),
    }


def _group_facts(payload: bytes) -> dict[str, Any] | None:
    """Return the ids in the entry; None if it is not a valid message."""
    try:
        group = value_pb2.LabelledGroup.FromString(payload)
    except DecodeError:
        return None
    return {"run_id": group.run_id, "step": group.step, "group_id": group.group_id, "domain": group.domain}
