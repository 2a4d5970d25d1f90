"""A run whose services want a token and speak TLS: told so in one place each, it works as any other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.e2e.conftest import tiny_settings
from tests.support.local_services import COMMAND, services_up, write_run_file
from tests.support.tiny_models import make_tiny_llama
from tests.support.tokens import write_token

from poise_client import GenerationClient, LearnerClient, RetryPolicy, TlsOptions, ValueClient
from poise_client.errors import PoiseClientError, UnauthenticatedError

DATA = Path(__file__).parents[1] / "integration" / "runtime" / "data"
CERTIFICATE, KEY = DATA / "localhost.crt", DATA / "localhost.key"


def test_a_run_with_a_token_and_tls_trains_and_lets_in_nobody_else(tmp_path: Path) -> None:
    token_file = write_token(tmp_path / "token", "open-sesame")
    settings = tiny_settings(make_tiny_llama(tmp_path / "model"))
    for service in ("generation", "value", "learner"):
        settings[service] = settings.get(service, {}) | {  # type: ignore[attr-defined]
            "auth": {"token_file": str(token_file)},
            "grpc": {"tls_cert_file": str(CERTIFICATE), "tls_key_file": str(KEY)},
        }
    settings["train"] = settings["train"] | {"prompts_per_step": 8, "evaluation": {"num_prompts": 0}}  # type: ignore[operator]
    with services_up(write_run_file(tmp_path, settings)) as run, pytest.MonkeyPatch.context() as environment:
        environment.delenv("POISE_TOKEN_FILE")
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, "train", "-c", str(tmp_path / "run.yaml")], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        steps = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
        assert [step["policy_version"] for step in steps] == [1]

        no_retries, tls = RetryPolicy(max_attempts=1), TlsOptions(root_certs_file=CERTIFICATE)
        refused = pytest.raises(UnauthenticatedError)
        with GenerationClient(run.grpc_address("generation"), tls=tls, retries=no_retries) as generation, refused:
            generation.get_policy()
        with ValueClient(run.grpc_address("value"), tls=tls, retries=no_retries) as value, refused:
            value.get_probe()
        plain = LearnerClient(run.grpc_address("learner"), retries=no_retries, timeout_s=5.0)
        with plain, pytest.raises(PoiseClientError):
            plain.get_status()
