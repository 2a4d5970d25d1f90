"""The `poise` command as a process."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from poise.cli import main
from poise.local.addresses import SERVICES
from poise.runtime.cli.exit_status import OUTPUT_CLOSED

COMMAND = [sys.executable, "-c", "from poise.cli import main; main()"]


def poise(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, cwd=folder)


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "poise run --preset tiny" in poise("--help").stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5  # of processor time: a busy machine does not count
    code = (
        "import sys, poise.cli; print([m for m in ('torch', 'vllm', 'grpc', 'pydantic', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_every_command_and_option_has_help() -> None:
    known = {"run", "up", "train", "eval", "status", "check", "queue", "compare", "config", "models"}
    assert known <= main.commands.keys()
    group = main.commands["queue"]
    assert isinstance(group, click.Group)
    commands = {(name,): command for name, command in main.commands.items()}
    commands |= {("queue", name): command for name, command in group.commands.items()}
    for names, command in commands.items():
        done = CliRunner().invoke(main, [*names, "--help"], prog_name="poise")
        assert done.exit_code == 0
        usage, what, *_ = done.output.split("\n\n")
        assert usage.startswith(f"Usage: poise {' '.join(names)} ")
        assert re.search(r"\w{3,} .*[.?:]", " ".join(what.split())), f"{names} says no sentence about itself"
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.opts[-1] in done.output
                assert option.help and option.help.endswith("."), f"{names}: {option.opts[-1]} is not explained"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "set either -c FILE or --preset NAME"),
        (["run", "--preset", "tiny", "-c", "run.yaml"], "set either -c FILE or --preset NAME"),
        (["run", "--preset", "huge"], "preset 'huge' is unknown; known: smollm2, tiny"),
        (["up", "-c", "absent.yaml"], "absent.yaml: cannot be read"),
        (["up", "-c", "broken.yaml"], "broken.yaml: is not YAML"),
        (["up", "-c", "list.yaml"], "list.yaml: must consist of `name: value` lines"),
        (["train", "-c", "good.yaml", "--set", "train.num_steps"], "must look like section.field=value"),
        (["train", "-c", "good.yaml", "--set", "train.num_steps=many"], "--set train.num_steps"),
        (["config", "-c", "good.yaml", "--set", "trian.num_steps=3"], "trian: unknown; did you mean 'train'?"),
        (["config", "-c", "good.yaml", "--set", "generation.grpc=3"], "--set generation.grpc"),
        (["status", "-c", "good.yaml", "--set", "run.dir=/dev/null/x"], "run.dir: /dev/null/x cannot be used"),
        (
            ["status", "-c", "good.yaml", "--set", "value.auth.token_file=gone"],
            "auth.token_file: gone cannot be read",
        ),
        (["models", "gpt"], "model 'gpt' is unknown; known: tiny"),
        (["compare"], "set -c FILE; `poise compare --show-defaults` prints a file to start from"),
        (["compare", "-c", "absent.yaml"], "absent.yaml: cannot be read"),
        (["compare", "-c", "good.yaml"], "good.yaml: name: required, but not set"),
        (["compare", "-c", "compare.yaml"], "runs.a: set: train.num_steps: cannot differ between runs"),
        (["queue", "list"], "set either -c FILE or --preset NAME"),
        (["up", "-c", "good.yaml", "--set", "learner.auth.token_file=gone"], "poise: auth.token_file: gone cannot"),
        (
            ["up", "-c", "good.yaml"]
            + [f"--set={name}.grpc.tls_{kind}_file=gone" for name in SERVICES for kind in ("cert", "key")],
            "generation: grpc.tls_cert_file: gone cannot be read",
        ),
        *(
            (["queue", "list", "--admin", url], f"--admin: {url!r} must be")
            for url in (
                "file:///etc",
                "a:1",
                "http://",
                "http://[::1",
                "http://a b:1",
                "http://a:99999",
                "http://a:1/x",
            )
        ),
        (["queue", "list", "--admin", "http://a:1", "--preset", "tiny"], "set either --admin or a run"),
        (["queue", "list", "--preset", "tiny", "--token-file", "gone"], "--token-file requires --admin"),
        (
            ["queue", "list", "--admin", "http://127.0.0.1:1", "--token-file", "gone"],
            "--token-file: gone cannot be read",
        ),
        (["queue", "replay", "--admin", "http://127.0.0.1:1"], "name ids from `poise queue list`, or set --all"),
        (["queue", "discard", "1-1", "--all", "--admin", "http://127.0.0.1:1"], "name ids from"),
    ],
)
def test_mistake_is_one_message_with_status_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "broken.yaml").write_text("run: [")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    (tmp_path / "good.yaml").write_text("model: org/model\ntrain: {tasks: [{kind: digits}]}\n")
    (tmp_path / "compare.yaml").write_text(
        "{name: c, base: tiny, budget: {updates: 1}, runs: {a: {algorithm: rloo, set: {train.num_steps: 2}}}}"
    )
    done = poise(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("action", [["status"], ["list"], ["replay", "1-1"], ["discard", "--all"]], ids=" ".join)
def test_unreachable_queue_gives_status_1(action: list[str]) -> None:
    done = poise("queue", *action, "--admin", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "does not respond" in done.stderr


@pytest.mark.parametrize("answer", [b"", b"\x00\x00\x04\x08", b"HTTP/1.1 200 OK\r\n\r\n<html>", b"SSH-2.0-OpenSSH\r\n"])
def test_another_program_at_the_queue_address_is_reported(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        done = poise("queue", "status", "--admin", f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert done.returncode == 1
    assert "is not a value service" in done.stderr or "does not respond" in done.stderr
    assert "Traceback" not in done.stderr


def test_status_without_services_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: org/model\ntrain: {tasks: [{kind: digits}]}\n")
    done = poise("status", "-c", "run.yaml", folder=tmp_path)
    assert done.returncode == 1
    assert done.stdout.count("is not running. Start it with `poise up`") == 3
    facts = json.loads(poise("status", "-c", "run.yaml", "--json", folder=tmp_path).stdout)
    assert facts["services"]["learner"]["ready"] is False


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["models"], ["config", "--show-defaults"], ["status", "--preset", "tiny"], ["queue", "--help"]],
    ids=" ".join,
)
def test_command_without_a_reader_exits_quietly(tmp_path: Path, arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, cwd=tmp_path
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (OUTPUT_CLOSED, "")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpc.port=99999", "--set grpc: unknown here; set `generation.grpc` or `value.grpc` or `learner.grpc`"),
        ("num_steps=3", "--set num_steps: unknown here; set `train.num_steps`"),
        ("generation.grpc.port=99999", "grpc.port: Input should be less than or equal to 65535 (given: 99999)"),
        ("train.num_steps=abc", "num_steps: Input should be a valid integer"),
        ("train.num_steps=yes", "num_steps must be a number, not true"),
        ("train.endpoints.value=::1:5", "an IPv6 address needs brackets: [::1]:50051"),
    ],
)
def test_wrong_option_is_reported_before_the_start(tmp_path: Path, override: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text("model: org/model\ntrain: {tasks: [{kind: digits}]}\n")
    done = poise("up", "-c", "run.yaml", "--set", override, folder=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "runs" / "run" / "logs").exists()


@pytest.mark.parametrize("name", ["POISE_VALU_GRPC__PORT", "POISE_RUN__SEED", "POISE_GENERATION_CACHE__SIZE"])
def test_variable_of_no_setting_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    done = poise("up", "--preset", "tiny", folder=tmp_path)
    assert done.returncode == 2
    assert f"{name} (environment): " in done.stderr


@pytest.mark.parametrize("command", ["up", "run"])
def test_folder_too_long_for_a_socket_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    done = poise(command, "--preset", "tiny", folder=tmp_path)
    assert done.returncode == 2
    assert "the Unix socket path" in done.stderr
    assert "Set TMPDIR to a shorter folder" in done.stderr
