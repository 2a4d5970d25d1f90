import inspect
import threading
import typing
from collections.abc import AsyncIterator, Iterator

import pytest

from poise_client import (
    AsyncGenerationClient,
    AsyncLearnerClient,
    AsyncRun,
    AsyncValueClient,
    GenerationClient,
    LearnerClient,
    Run,
    ValueClient,
)
from poise_client._transport import background
from poise_client.errors import InvalidRequestError
from poise_client.types import Prompt

TWINS = [
    (AsyncGenerationClient, GenerationClient),
    (AsyncValueClient, ValueClient),
    (AsyncLearnerClient, LearnerClient),
    (AsyncRun, Run),
]


def public(client):
    members = inspect.getmembers(client, lambda member: inspect.isfunction(member) or isinstance(member, property))
    return {name: member for name, member in members if not name.startswith("_")}


@pytest.mark.parametrize(("asynchronous", "blocking"), TWINS)
def test_blocking_clients_have_the_same_methods(asynchronous, blocking):
    assert public(asynchronous).keys() == public(blocking).keys()
    assert getattr(asynchronous, "service", None) == getattr(blocking, "service", None)


@pytest.mark.parametrize(("asynchronous", "blocking"), TWINS)
def test_blocking_methods_have_the_same_signatures(asynchronous, blocking):
    constructors = [("__init__", asynchronous.__init__)] if hasattr(asynchronous, "service") else []
    for name, theirs in [*public(asynchronous).items(), *constructors]:
        if isinstance(theirs, property):
            continue
        ours = getattr(blocking, name)
        parameters = inspect.signature(theirs).parameters
        assert inspect.signature(ours).parameters == parameters, name
        their_hints, our_hints = typing.get_type_hints(theirs), typing.get_type_hints(ours)
        given, returned = their_hints.pop("return"), our_hints.pop("return")
        assert our_hints == their_hints, name
        assert not inspect.iscoroutinefunction(ours), name
        if inspect.isasyncgenfunction(theirs):
            assert issubclass(typing.get_origin(given), AsyncIterator)
            assert issubclass(returned, Iterator)
            assert typing.get_type_hints(returned.__next__)["return"] == typing.get_args(given)[0]
        else:
            assert returned == given, name


def test_a_client_that_was_never_used_starts_no_thread():
    before = threading.active_count()
    with GenerationClient("localhost:1") as client:
        assert threading.active_count() == before
        assert client.target == "localhost:1"
        assert repr(client) == "GenerationClient('localhost:1')"
    client.close()


def test_a_closed_client_raises():
    client = ValueClient("localhost:1")
    client.close()
    with pytest.raises(RuntimeError, match=r"is closed\. Create a new one"):
        client.get_probe()
    stream = GenerationClient("localhost:1")
    groups = stream.stream_trajectories("run", 0, [Prompt("g", "?")], num_rollouts=1)
    stream.close()
    with pytest.raises(RuntimeError, match="is closed"):
        next(groups)
    groups.close()


def test_clients_share_one_thread_until_the_last_closes():
    def named():
        return [thread for thread in threading.enumerate() if thread.name == "poise_client"]

    with GenerationClient("localhost:1", timeout_s=-1) as one, ValueClient("localhost:1", timeout_s=-1) as other:
        for call in (one.get_policy, other.get_probe):
            with pytest.raises(InvalidRequestError):
                call()
        assert len(named()) == 1
        one.close()
        assert len(named()) == 1
    assert named() == []


def test_a_new_thread_starts_after_the_last_one_ended():
    for _ in range(2):
        with ValueClient("localhost:1", timeout_s=-1) as client, pytest.raises(InvalidRequestError):
            client.get_probe()


def test_a_dead_loop_is_not_reused():
    shared = background.SharedLoop()
    first = shared.acquire()
    first.stop()
    second = shared.acquire()
    assert second is not first
    assert second.is_alive()
    shared.release(first)
    assert second.is_alive()
    shared.release(second)
    assert not second.is_alive()
