"""Checks of a server's INFO and CONFIG, and the remedy for each of its errors."""

from __future__ import annotations

import ssl

import pytest
from redis import exceptions
from redis.crc import key_slot

from poise.errors import BackendDown, QueueFull
from poise.queue.redis_errors import UnsuitableServerError, reconnect_may_help, to_poise_error
from poise.queue.redis_scripts import dead_letter_key
from poise.queue.redis_server import examine, is_cluster, parse_info

GOOD = {
    "redis_version": "7.2.4",
    "role": "master",
    "loading": "0",
    "maxmemory": "0",
    "maxmemory_policy": "noeviction",
    "aof_enabled": "1",
    "aof_last_write_status": "ok",
}
NEEDED = 1000


def test_a_suitable_server_has_no_shortcomings():
    report = examine(GOOD, {"appendfsync": "always", "save": ""}, NEEDED)
    assert (report.publish_error, report.warnings) == (None, ())


@pytest.mark.parametrize(
    ("changes", "named", "remedy"),
    [
        ({"redis_version": "5.0.14"}, "has version 5.0.14; the queue needs 6.2", "6.2"),
        ({"redis_version": "6.0.16"}, "has version 6.0.16; the queue needs 6.2", "6.2"),
        ({"redis_version": "2.8"}, "needs 6.2", "Valkey"),
        ({"redis_mode": "sentinel"}, "Sentinel", "primary"),
        ({"loading": "1", "loading_eta_seconds": "40"}, "is loading its data from disk, 40 s left", "Wait"),
        ({"role": "slave", "master_host": "db-1", "master_port": "6379"}, "replica of db-1:6379", "db-1:6379"),
    ],
)
def test_an_unsuitable_server_is_rejected_with_a_remedy(changes, named, remedy):
    with pytest.raises(UnsuitableServerError, match=named) as caught:
        examine(GOOD | changes, {}, NEEDED)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("version", ["6.2.0", "7.0.15", "9.1.2", "255.255.255", "unstable", ""])
def test_newer_and_unknown_versions_are_accepted(version):
    examine(GOOD | {"redis_version": version}, {}, NEEDED)


@pytest.mark.parametrize(
    ("changes", "config", "warning"),
    [
        ({"maxmemory": "1249"}, {}, "maxmemory 1249 bytes, but queue.max_bytes and queue.max_dead"),
        ({"maxmemory_policy": "allkeys-lru"}, {}, "once maxmemory is set"),
        ({"aof_enabled": "0"}, {"save": ""}, "writes nothing to disk"),
        ({"aof_enabled": "0"}, {}, "has no append-only file"),
        ({}, {"appendfsync": "everysec"}, "the last second of labels"),
        ({"aof_last_write_status": "err"}, {}, "failed to write its append-only file"),
    ],
)  # fmt: skip
def test_settings_that_may_lose_labels_give_a_warning(changes, config, warning):
    (found,) = examine(GOOD | changes, config, NEEDED).warnings
    assert warning in found


def test_a_server_that_denies_info_gives_a_warning():
    (warning,) = examine({}, {}, NEEDED).warnings
    assert "INFO" in warning


def test_info_with_sections_and_odd_lines_is_parsed():
    info = parse_info("# Server\r\nredis_version:7.0.15\r\n\r\n# Cluster\r\ncluster_enabled:1\r\nexecutable:/a:b\r\n")
    assert info == {"redis_version": "7.0.15", "cluster_enabled": "1", "executable": "/a:b"}
    assert is_cluster(info)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (exceptions.ReadOnlyError("You can't write against a read only replica."), "read-only replica"),
        (exceptions.ResponseError("UNBLOCKED force unblock from blocking operation"), "read-only replica"),
        (exceptions.ResponseError("Error running script (call to f_1): READONLY You can't write"), "read-only replica"),
        (exceptions.MasterDownError("Link with MASTER is down"), "lost its primary"),
        (exceptions.BusyLoadingError("Redis is loading the dataset in memory"), "loaded its data"),
        (exceptions.ConnectionError("max number of clients reached"), "maxclients"),
        (exceptions.ResponseError("DENIED Redis is running in protected mode"), "protected mode"),
        (exceptions.AuthenticationError("invalid username-password pair"), "redis://user:password@"),
        (exceptions.NoPermissionError("User x has no permissions"), "Grant"),
        (exceptions.ResponseError("MISCONF Errors writing to the AOF file"), "space on its disk"),
        (exceptions.ResponseError("NOREPLICAS Not enough good replicas to write."), "min-replicas-to-write"),
        (exceptions.ClusterDownError("The cluster is down"), "Repair the cluster"),
        (exceptions.TryAgainError("Multiple keys request during rehashing of slot"), "has moved the queue's slot"),
        (exceptions.ResponseError("WRONGTYPE Operation against a key"), "queue.stream"),
        (exceptions.ResponseError("BUSY Redis is busy running a script"), "SCRIPT KILL"),
        (exceptions.ResponseError("The stream has exhausted the last possible ID"), "queue.stream"),
        (exceptions.ResponseError("unknown command 'XAUTOCLAIM'"), "6.2"),
        (exceptions.ResponseError("SELECT is not allowed in cluster mode"), "database number that exists"),
        (ssl.SSLError("record layer failure"), "uses TLS"),
        (ConnectionRefusedError("refused"), "Check that the Redis server runs"),
    ],
)  # fmt: skip
def test_every_error_names_its_remedy(error, remedy):
    shown = to_poise_error(error, "host:6379")
    assert isinstance(shown, BackendDown)
    assert "host:6379" in shown.message
    assert remedy in shown.remedy


@pytest.mark.parametrize(
    "error",
    [
        exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
        exceptions.ResponseError("Error running script: OOM command not allowed when used memory > 'maxmemory'."),
    ],
)
def test_a_server_out_of_memory_is_queue_full(error):
    assert isinstance(to_poise_error(error, "host:6379"), QueueFull)


def test_a_long_error_of_a_server_is_truncated():
    assert len(to_poise_error(exceptions.ResponseError("x" * 5000), "host:6379").message) < 400


def test_only_connection_errors_are_retried():
    again = (exceptions.ReadOnlyError("x"), exceptions.ConnectionError("x"), exceptions.TimeoutError("x"), OSError("x"))
    final = (exceptions.AuthenticationError("x"), exceptions.BusyLoadingError("x"), exceptions.ResponseError("x"))
    assert [reconnect_may_help(error) for error in again] == [True] * 4
    assert [reconnect_may_help(error) for error in final] == [False] * 3


@pytest.mark.parametrize(
    ("stream", "key"),
    [
        ("poise:labels", "{poise:labels}:dead"),
        ("{poise}:labels", "{poise}:labels:dead"),
        ("a{b}c", "a{b}c:dead"),
        ("a{b", "{a{b}:dead"),
    ],
)
def test_dead_letters_share_the_slot_of_their_stream(stream, key):
    assert dead_letter_key(stream) == key
    assert key_slot(key.encode()) == key_slot(stream.encode())


@pytest.mark.parametrize("stream", ["a}b", "{}a", "a{}b"])
def test_a_name_without_a_dead_letter_key_is_rejected(stream):
    with pytest.raises(ValueError, match="braces"):
        dead_letter_key(stream)
