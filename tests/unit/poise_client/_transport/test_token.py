"""Token files: changes are read, and files that other users can access are rejected."""

from __future__ import annotations

import os

import pytest
from tests.support.tokens import write_token

from poise_client import AsyncValueClient, GenerationClient, LearnerClient, TokenFile, ValueClient
from poise_client._transport import token as token_module
from poise_client._transport.channel import Dialer


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def replaced(path, token: str) -> None:
    """Replace the file atomically, as Kubernetes does."""
    write_token(path.with_suffix(".new"), token).replace(path)


def test_a_changed_token_is_read_and_the_old_one_accepted(tmp_path):
    clock = Clock()
    path = write_token(tmp_path / "token", "first")
    file = TokenFile(path, clock)
    assert (file.current, file.accepted, file.changed_lately) == ("first", ("first",), False)
    replaced(path, "second")
    assert (file.current, file.accepted, file.changed_lately) == ("second", ("second", "first"), True)
    clock.now_s += token_module.ROTATION_S
    assert (file.accepted, file.changed_lately) == (("second",), False)


def test_rewriting_the_same_token_is_not_a_change(tmp_path):
    path = write_token(tmp_path / "token", "same")
    file = TokenFile(path)
    replaced(path, "same")
    assert (file.accepted, file.changed_lately) == (("same",), False)


@pytest.mark.parametrize("breaking", ["removed", "emptied", "opened"])
def test_an_invalid_file_keeps_the_token_and_is_reported(tmp_path, breaking):
    path = write_token(tmp_path / "token", "kept")
    file = TokenFile(path)
    if breaking == "removed":
        path.unlink()
    elif breaking == "emptied":
        path.write_text("")
    else:
        write_token(path, "spied").chmod(0o644)
    assert (file.current, bool(file.problem)) == ("kept", True)
    assert "spied" not in file.problem
    path.unlink(missing_ok=True)
    write_token(path, "mended")
    assert (file.current, file.problem) == ("mended", "")


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o660, 0o666, 0o602, 0o620, 0o755])
def test_a_file_open_to_others_is_rejected_with_a_remedy(tmp_path, mode):
    path = write_token(tmp_path / "token", "hunter2")
    path.chmod(mode)
    for make in (TokenFile, lambda file: ValueClient("localhost:1", token_file=file)):
        with pytest.raises(ValueError, match=f"has mode {mode:04o}: other users can use the token") as caught:
            make(path)
        assert f"chmod 600 {path}" in str(caught.value)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_file_of_only_this_user_is_accepted(tmp_path, mode):
    path = write_token(tmp_path / "token", "hunter2")
    path.chmod(mode)
    assert TokenFile(path).current == "hunter2"


def facts(mode: int, uid: int, gid: int) -> os.stat_result:
    return os.stat_result((0o100000 | mode, 1, 1, 1, uid, gid, 7, 0, 0, 0))


def test_a_secret_mounted_for_the_pods_group_is_accepted(tmp_path):
    group = os.getegid()
    for mode in (0o440, 0o640):
        token_module.reject_shared_file(tmp_path, facts(mode, 0, group))
    for mode, uid, gid in ((0o440, 1234, group), (0o440, 0, 54321), (0o444, 0, group), (0o460, 0, group)):
        with pytest.raises(ValueError, match="defaultMode: 0440"):
            token_module.reject_shared_file(tmp_path, facts(mode, uid, gid))


@pytest.mark.parametrize("client", [GenerationClient, ValueClient, LearnerClient, AsyncValueClient])
def test_the_environment_sets_a_default_token_file(tmp_path, monkeypatch, client):
    monkeypatch.setenv("POISE_TOKEN_FILE", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="absent"):
        client("localhost:1")
    client("localhost:1", token="own")


def test_every_call_sends_the_current_token(tmp_path, monkeypatch):
    path = write_token(tmp_path / "token", "first")
    monkeypatch.setenv("POISE_TOKEN_FILE", str(path))
    dialer = Dialer("localhost:1", None, None, None, False, False)
    assert dialer.metadata == (("authorization", "Bearer first"),)
    replaced(path, "second")
    assert dialer.metadata == (("authorization", "Bearer second"),)


def test_a_token_and_a_file_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="token and token_file"):
        ValueClient("localhost:1", token="t", token_file=write_token(tmp_path / "token", "t"))


def test_a_token_of_a_file_is_not_sent_in_plaintext(tmp_path):
    with pytest.raises(ValueError, match="would be sent in plaintext"):
        ValueClient("value.example.org:1", token_file=write_token(tmp_path / "token", "t"))
