"""Without any setting, other users of the machine can neither use a run's services nor read what it writes."""

from __future__ import annotations

import stat
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from poise.local.run_file import SERVICES, LocalRun
from poise_client import GenerationClient, LearnerClient, RetryPolicy, ValueClient
from poise_client.errors import UnauthenticatedError

ONCE = RetryPolicy(max_attempts=1)

CALLS = {
    "generation": (GenerationClient, "get_policy"),
    "value": (ValueClient, "get_probe"),
    "learner": (LearnerClient, "get_status"),
}


def call(service: str, address: str) -> None:
    make_client, method = CALLS[service]
    with make_client(address, retries=ONCE) as client:
        getattr(client, method)()


@pytest.mark.parametrize("service", SERVICES)
def test_without_the_runs_token_nobody_is_served(
    tiny_run: LocalRun, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = tiny_run.grpc_address(service)
    call(service, address)  # with the token that the environment names
    monkeypatch.delenv("POISE_TOKEN_FILE")
    with pytest.raises(UnauthenticatedError):
        call(service, address)
    for action in ("pause", "drain"):
        request = urllib.request.Request(
            f"http://{tiny_run.admin_address(service)}/admin/v1/{action}", b"{}", method="POST"
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        refused.value.close()
        assert refused.value.code in (401, 403)


def test_nothing_of_the_run_can_be_read_by_others(tiny_run: LocalRun) -> None:
    open_to_others = [path for path in (tiny_run.dir, *tiny_run.dir.rglob("*")) if is_open(path)]
    assert open_to_others == []
    assert not is_open(tiny_run.socket.parent)


def is_open(path: Path) -> bool:
    return not path.is_symlink() and bool(stat.S_IMODE(path.stat().st_mode) & 0o077)


def test_the_token_is_in_no_argument_and_no_log(tiny_run: LocalRun) -> None:
    token = (tiny_run.services_dir / "token").read_text().strip()
    arguments = [process.info["cmdline"] or () for process in psutil.process_iter(["cmdline"])]
    assert not any(token in argument for each in arguments for argument in each)
    texts = [path.read_bytes() for path in tiny_run.dir.rglob("*") if path.is_file() and path.name != "token"]
    assert not any(token.encode() in text for text in texts)
