"""Sends inputs concurrently, in rounds; after each round the services must be unchanged."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from tests.fuzz.inputs import Input
from tests.fuzz.target import State, Target

from poise_proto.v1 import value_pb2

TIMEOUT_S = 20.0
IN_FLIGHT = 48
MEMORY_BYTES = 256 * 2**20
"""How much more memory a service may hold than after the first round."""
SETTLE_S = 120.0

_DEFECTS = ("INTERNAL", "UNKNOWN", "DATA_LOSS")
_PUBLISH = "/poise.v1.ValueService/PublishLabels"
_SUBMIT = "/poise.v1.LearnerService/SubmitAdvantages"
_PUSH = "/poise.v1.GenerationService/UpdateWeights"
_CORE_ARTEFACTS = ("Internal error from Core", "Received RST_STREAM with error code")
"""Errors of the client's own gRPC for a call that ends while it still sends; no service sent them."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault, and the input that caused it, if known."""

    what: str
    input: Input | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one input ended."""

    input: Input
    status: str
    detail: str = ""
    answer: bytes = b""


@dataclass
class Campaign:
    """Everything that was sent to a target, and how it ended."""

    target: Target
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    num_inputs: int = 0
    _warm_bytes: dict[str, int] = field(default_factory=dict)
    _last_bytes: dict[str, int] = field(default_factory=dict)
    _instances: dict[str, int] = field(default_factory=dict)

    async def round(self, inputs: Sequence[Input], *, in_flight: int = IN_FLIGHT) -> None:
        """Send inputs, then check the services."""
        self._instances = self._instances or self.target.instances()
        before = await self.target.state()
        waiting = iter(inputs)
        outcomes: list[Outcome] = []

        async def work() -> None:
            for one in waiting:
                outcome = await self._send(one)
                self.counts[one.method.rpartition("/")[2], outcome.status] += 1
                self._judge(outcome)
                outcomes.append(outcome)

        await asyncio.gather(*(work() for _ in range(in_flight)))
        self.num_inputs += len(outcomes)
        await self._compare(before, outcomes)
        self._look_at_processes()

    def _judge(self, outcome: Outcome) -> None:
        one, status = outcome.input, outcome.status
        if status in _DEFECTS or (status.startswith("5") and status != "503"):
            self.problems.append(Problem(f"{one.method} answered {status}: {outcome.detail}", one))
        elif one.must_be_refused and not status.startswith("4"):
            self.problems.append(Problem(f"{one.method} answered {status} where it had to reject", one))
        elif one.rpc is not None and one.rpc.is_status and status in ("DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"):
            self.problems.append(Problem(f"{one.method} had to wait: {status}", one))

    async def _compare(self, before: State, outcomes: Sequence[Outcome]) -> None:
        """Compare the state with the accepted inputs. Labels take a moment from the queue to the probe."""
        accepted = [outcome for outcome in outcomes if outcome.status in ("OK", "CANCELLED", "DEADLINE_EXCEEDED")]
        least = most = before.num_labels
        for outcome in accepted:
            if outcome.input.method == _PUBLISH:
                least += _num_queued(outcome)
                most += _num_sent(outcome) if outcome.status != "OK" else _num_queued(outcome)
        may_train = any(outcome.input.method == _SUBMIT for outcome in accepted)
        may_push = any(outcome.input.method == _PUSH and outcome.status == "OK" for outcome in accepted)

        def is_right(now: State) -> bool:
            return (
                least <= now.num_labels <= most
                and (may_train or now.training == before.training)
                and (may_push or may_train or now.policy == before.policy)
                and all(now.is_ready)
            )

        deadline_s = time.monotonic() + SETTLE_S
        now: State | None = None
        while now is None or not is_right(now):
            if time.monotonic() > deadline_s:
                numbers = f"inputs {outcomes[0].input.number} to {outcomes[-1].input.number}"
                expected = f"{before}, with {least} to {most} labels"
                self.problems.append(
                    Problem(f"{numbers} left {now or 'a service that does not answer'}; it was {expected}")
                )
                return
            await asyncio.sleep(0.1)
            with contextlib.suppress(grpc.aio.AioRpcError):
                now = await self.target.state()

    def _look_at_processes(self) -> None:
        self.problems += [Problem(f"a log holds an error: {complaint}") for complaint in self.target.complaints()]
        if (instances := self.target.instances()) != self._instances:
            self.problems.append(Problem(f"services were restarted: {self._instances} to {instances}"))
            self._instances = instances
            return
        now_bytes = self.target.memory_bytes()
        self._warm_bytes = self._warm_bytes or now_bytes
        least_bytes = {name: min(held, self._last_bytes.get(name, held)) for name, held in now_bytes.items()}
        self._last_bytes = now_bytes
        for name, held in least_bytes.items():  # of two looks: work in progress needs memory too
            if held > self._warm_bytes[name] + MEMORY_BYTES:
                grown = (held - self._warm_bytes[name]) // 2**20
                self.problems.append(Problem(f"{name} has grown by {grown} MiB over {self.num_inputs} inputs"))
                self._warm_bytes[name] = held

    async def _send(self, one: Input) -> Outcome:
        if one.rpc is None:
            return await self._send_bytes(one)
        channels = self.target.channels[one.service]
        channel: Any = channels[one.number % len(channels)]
        takes_many, gives_many = one.rpc.is_streaming
        kind = f"{'stream' if takes_many else 'unary'}_{'stream' if gives_many else 'unary'}"
        metadata = self.target.metadata(one.service) if one.has_token else ()
        request: Any = _sent(one) if takes_many else one.messages[0]
        deadline_s = 0.5 if one.method.endswith("/Watch") else TIMEOUT_S
        call = getattr(channel, kind)(one.method)(request, metadata=metadata, timeout=deadline_s)
        if one.cancel_after is not None and not takes_many:
            asyncio.get_running_loop().call_later(0.002 * one.cancel_after, call.cancel)
        try:
            answer = b""
            if gives_many:
                async for _ in call:
                    pass
            else:
                answer = await call
            return Outcome(one, "OK", answer=answer)
        except asyncio.CancelledError:
            return Outcome(one, "CANCELLED")
        except grpc.aio.AioRpcError as error:
            detail = error.details() or ""
            if error.code() is grpc.StatusCode.INTERNAL and detail.startswith(_CORE_ARTEFACTS):
                return Outcome(one, "CANCELLED", detail)
            return Outcome(one, error.code().name, detail)

    async def _send_bytes(self, one: Input) -> Outcome:
        host, port = self.target.address(one.service, is_admin=one.method == "http")
        try:
            async with asyncio.timeout(TIMEOUT_S):
                reader, writer = await asyncio.open_connection(host, port)
                try:
                    writer.write(one.messages[0])
                    if writer.can_write_eof():
                        writer.write_eof()
                    answer = await reader.read(65536) if one.method == "http" else await reader.read(100)
                finally:
                    writer.close()
        except TimeoutError:
            return Outcome(one, "given up")
        except OSError:
            return Outcome(one, "closed")
        if one.method == "raw" or not answer:
            return Outcome(one, "closed")
        status = answer[9:12].decode(errors="replace")
        return Outcome(one, status, answer[:1000].decode(errors="replace"))


async def _sent(one: Input) -> AsyncIterator[bytes]:
    for index, message in enumerate(one.messages):
        if index == one.cancel_after:
            raise asyncio.CancelledError
        yield message


def _num_queued(outcome: Outcome) -> int:
    if outcome.status != "OK":
        return 0
    return int(value_pb2.PublishLabelsResponse.FromString(outcome.answer).num_queued)


def _num_sent(outcome: Outcome) -> int:
    try:
        return len(value_pb2.PublishLabelsRequest.FromString(outcome.input.messages[0]).groups)
    except Exception:
        return 0


async def run_rounds(
    campaign: Campaign,
    make: Callable[[int], Input],
    *,
    start: int,
    seconds: float,
    per_round: int,
    say: Callable[[str], None],
) -> int:
    """Send rounds for `seconds`, at least one, until a problem occurs; return the number of the next input."""
    began_s = time.monotonic()
    number = start
    while (time.monotonic() - began_s < seconds or number == start) and not campaign.problems:
        await campaign.round([make(number + index) for index in range(per_round)])
        number += per_round
        took_s = time.monotonic() - began_s
        say(f"{campaign.num_inputs} inputs, {campaign.num_inputs / took_s:.0f} a second")
    return number
