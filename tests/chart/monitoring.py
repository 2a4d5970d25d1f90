"""Run a real Prometheus and its promtool."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "helm" / "poise" / "files" / "alerts.yaml"
DASHBOARD = ROOT / "helm" / "poise" / "files" / "dashboard.json"
DEADLINE_S = 300.0


def filled_in(expression: str) -> str:
    """Return a query of the dashboard with its variables at All."""
    return expression.replace("$namespace", ".*").replace("$release", ".*")


def find(name: str) -> str | None:
    """Return the path of `prometheus` or `promtool`, or None."""
    unpacked = Path(sys.executable).parents[1] / "prometheus" / "usr" / "bin" / name
    return str(unpacked) if unpacked.exists() else shutil.which(name)


def program(name: str) -> str:
    """Return the path of a program; skip the test without it."""
    found = find(name)
    if found is None:
        pytest.skip(f"{name} is not installed; `make .venv/.prometheus` fetches it with apt-get")
    return found


def promtool(*arguments: str, text: str | None = None) -> str:
    """Run promtool, which must succeed, and return its output."""
    done = subprocess.run(
        [program("promtool"), *arguments], input=text, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


class Prometheus:
    """One Prometheus server that scrapes every second."""

    def __init__(self, folder: Path, address: str, targets: Mapping[str, str]) -> None:
        """Start a server that scrapes `targets`, host:port by job."""
        jobs = [
            {
                "job_name": job,
                "scrape_interval": "1s",
                "scrape_timeout": "1s",
                "static_configs": [{"targets": [t]}],
            }
            for job, t in targets.items()
        ]
        folder.mkdir()
        (folder / "prometheus.yml").write_text(json.dumps({"rule_files": [str(ALERTS)], "scrape_configs": jobs}))
        self._url = f"http://{address}"
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    program("prometheus"),
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={address}",
                ],
                stdout=log,
                stderr=log,
            )

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the samples of an instant query, without NaN."""
        url = f"{self._url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return [sample for sample in result if sample["value"][1] != "NaN"]

    def wait_for(self, expression: str) -> list[dict[str, Any]]:
        """Wait until a query has samples; return them."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                if found := self.query(expression):
                    return found
            except (urllib.error.URLError, ConnectionError):
                pass
            assert time.monotonic() < deadline, f"no data: {expression}"
            time.sleep(0.2)

    def stop(self) -> None:
        """Stop the server."""
        self._process.terminate()
        self._process.wait(DEADLINE_S)
