"""The services under test as the fuzzer sees them: addresses, state, logs, memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import grpc.aio
import psutil

from poise.local.addresses import SERVICES
from poise.local.run_file import LocalRun
from poise_proto.v1 import generation_pb2, generation_pb2_grpc, learner_pb2, learner_pb2_grpc, value_pb2, value_pb2_grpc

STATUS_TIMEOUT_S = 60.0
_LINES_SHOWN = 120
"""Enough for the last line of a traceback, which names the error."""
_BAD_WORDS = ("Traceback (most recent call last)", " ERROR ", '"level": "ERROR"')

_CHANNEL_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))


@dataclass(frozen=True, slots=True)
class State:
    """State that no rejected input may change."""

    policy: tuple[Any, ...]
    training: tuple[Any, ...]
    num_labels: int
    """Labels ever accepted: consumed, pending or dead-lettered."""
    is_ready: tuple[bool, ...]


class Target:
    """Running services. Use it within an event loop, and close it."""

    def __init__(self, run: LocalRun, channels_each: int = 4) -> None:
        self.run = run
        self.tokens: dict[str, str | None] = {name: getattr(run, name).auth.read_token() for name in SERVICES}
        self.channels = {
            name: [
                grpc.aio.insecure_channel(run.grpc_address(name), options=_CHANNEL_OPTIONS)
                for _ in range(channels_each)
            ]
            for name in SERVICES
        }
        self._log_ends = dict.fromkeys(SERVICES, 0)
        for name in SERVICES:
            self.new_log(name)

    async def close(self) -> None:
        """Close the channels."""
        for channels in self.channels.values():
            for channel in channels:
                await channel.close()

    def metadata(self, service: str) -> tuple[tuple[str, str], ...]:
        """Return the metadata of a caller that has the token."""
        token = self.tokens[service]
        return () if token is None else (("authorization", f"Bearer {token}"),)

    def address(self, service: str, *, is_admin: bool) -> tuple[str, int]:
        """Return host and port."""
        address = self.run.admin_address(service) if is_admin else self.run.grpc_address(service)
        host, port = address.rsplit(":", 1)
        return host.strip("[]"), int(port)

    async def state(self) -> State:
        """Return the state of the services. Raises `grpc.aio.AioRpcError` if one does not answer."""
        policy = await self._ask(
            "generation", generation_pb2_grpc.GenerationServiceStub, "GetPolicy", generation_pb2.GetPolicyRequest()
        )
        training = await self._ask(
            "learner", learner_pb2_grpc.LearnerServiceStub, "GetStatus", learner_pb2.GetStatusRequest()
        )
        probe = await self._ask("value", value_pb2_grpc.ValueServiceStub, "GetProbe", value_pb2.GetProbeRequest())
        return State(
            (policy.instance_id, policy.lineage_id, policy.policy_version, policy.digest),
            (
                training.lineage_id,
                training.policy_version,
                training.digest,
                training.num_batches,
                training.num_rollouts,
            ),
            probe.num_groups_consumed + probe.num_duplicates + probe.num_dead_letters + probe.num_pending,
            (policy.ready, training.state in (learner_pb2.LEARNER_STATE_IDLE, learner_pb2.LEARNER_STATE_PUBLISHING)),
        )

    async def width(self) -> int:
        """Return the width of the model."""
        policy = await self._ask(
            "generation", generation_pb2_grpc.GenerationServiceStub, "GetPolicy", generation_pb2.GetPolicyRequest()
        )
        return int(policy.hidden_size)

    async def _ask(self, service: str, stub: Any, method: str, request: Any) -> Any:
        call = getattr(stub(self.channels[service][0]), method)
        return await call(request, metadata=self.metadata(service), timeout=STATUS_TIMEOUT_S)

    def new_log(self, service: str) -> str:
        """Return the log of a service since the last call."""
        path = self.run.log(service)
        with path.open("rb") as file:
            file.seek(self._log_ends[service])
            data = file.read()
        self._log_ends[service] += len(data)
        return data.decode(errors="replace")

    def complaints(self) -> list[str]:
        """Return the lines around new tracebacks and errors in the logs."""
        found = []
        for service in SERVICES:
            lines = self.new_log(service).splitlines()
            for index, line in enumerate(lines):
                if any(word in line for word in _BAD_WORDS):
                    found.append(f"{service}: " + "\n".join(lines[max(0, index - 1) : index + _LINES_SHOWN]))
                    break
        return found

    def memory_bytes(self) -> dict[str, int]:
        """Return the resident memory of each service. Raises `KeyError` if one does not run."""
        pids = json.loads((self.run.services_dir / "pids.json").read_text())
        return {name: psutil.Process(pids[name][0]).memory_info().rss for name in SERVICES}

    def instances(self) -> dict[str, int]:
        """Return the process id of each service, which changes with a restart."""
        pids = json.loads((self.run.services_dir / "pids.json").read_text())
        return {name: pids[name][0] for name in SERVICES}
