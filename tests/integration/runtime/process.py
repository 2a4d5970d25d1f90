"""Start the stage service as a process, and call it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
from tests.support.forking import ForkedProgram

STAGE = Path(__file__).with_name("stage.py")
TIMEOUT_S = 240.0


def eventually(condition: Callable[[], Any], what: str = "") -> Any:
    """Return the first truth that `condition` answers."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"it never came to pass: {what or condition}"
        time.sleep(0.01)
    return answer


@dataclass
class Stage:
    """One process."""

    process: ForkedProgram
    log_file: Path
    address_file: Path
    token: str | None

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def error_lines(self) -> list[str]:
        return [line for line in self.log.splitlines() if " ERROR " in line]

    def addresses(self) -> dict[str, Any]:
        def bound() -> bool:
            assert self.process.poll() is None, self.log
            return self.address_file.exists()

        eventually(bound, "the addresses are announced")
        return json.loads(self.address_file.read_text())

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.addresses()["grpc"])

    def rest(self) -> httpx.Client:
        headers = {"x-poise": "1"} if self.token is None else {"authorization": f"Bearer {self.token}"}
        return httpx.Client(base_url=f"http://{self.addresses()['admin']}", headers=headers, timeout=TIMEOUT_S)

    def events(self) -> list[str]:
        with self.rest() as rest:
            return rest.get("/admin/v1/status").json()["events"]

    def wait_for_event(self, event: str) -> None:
        eventually(lambda: event in self.events(), event)

    def wait_for_log(self, text: str) -> None:
        eventually(lambda: text in self.log, text)

    def wait_until_ready(self) -> None:
        with self.rest() as rest:
            eventually(lambda: rest.get("/readyz").status_code == 200, "ready")

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def exit_status(self) -> int:
        return self.process.wait(TIMEOUT_S)


@contextlib.contextmanager
def run_stage(folder: Path, *settings: str, token: str | None = None, config: str = "") -> Iterator[Stage]:
    """Run it with `a.b=value` settings, on any free ports, and kill it afterwards."""
    config_file, log_file, address_file = folder / "stage.yaml", folder / "stage.log", folder / "stage.json"
    config_file.write_text(config)
    environment = os.environ | {"POISE_ADDRESS_FILE": str(address_file), "GRPC_VERBOSITY": "NONE"}
    if token is not None:
        environment["POISE_STAGE_AUTH__TOKEN"] = token
    options = [option for setting in settings for option in ("--set", setting)]
    process = ForkedProgram(str(STAGE), ["-c", str(config_file), *options], environment, log_file)
    try:
        yield Stage(process, log_file, address_file, token)
    finally:
        process.kill()
        process.wait(TIMEOUT_S)
