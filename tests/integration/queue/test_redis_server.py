"""The queue checks its assumptions about the server, and names the remedy where one fails."""

from __future__ import annotations

import asyncio
import random
import re

import pytest
import redis
from tests.support.redis_servers import DURABLE, LETTERS, STREAM, Proxy, RedisServers, make_queue, port_with_bus

from poise.errors import BackendDown, InvalidRequest, QueueFull


async def problem_of(queue, call) -> BackendDown:
    with pytest.raises(BackendDown) as caught:
        await call(queue)
    await queue.close()
    return caught.value


def publish(queue):
    return queue.publish([b"x"])


def read(queue):
    return queue.read(max_entries=9, wait_s=0.05)


def depth(queue):
    return queue.depth()


EVERY_CALL = pytest.mark.parametrize("call", [publish, read, depth])


@EVERY_CALL
async def test_the_client_follows_a_failover_to_the_new_primary(servers: RedisServers, call) -> None:
    old, new = servers.start(), servers.start()
    async with Proxy(old).open() as proxy:
        queue = make_queue(proxy.port)
        await queue.publish([b"before"])
        await read(queue)
        redis.Redis(port=new).replicaof("127.0.0.1", old)
        while redis.Redis(port=new).info("replication")["master_link_status"] != "up":
            await asyncio.sleep(0.05)
        redis.Redis(port=new).replicaof("no", "one")
        redis.Redis(port=old).replicaof("127.0.0.1", new)
        proxy.target = new
        await queue.publish([b"after"])
        await call(queue)
        assert redis.Redis(port=new).xlen(STREAM) >= 2
        assert (await queue.depth()).num_losses == 0
        await queue.close()


async def test_a_waiting_read_continues_at_the_new_primary(servers: RedisServers) -> None:
    old, new = servers.start(), servers.start()
    async with Proxy(old).open() as proxy:
        queue = make_queue(proxy.port)
        await read(queue)
        waiting = asyncio.create_task(queue.read(max_entries=1, wait_s=8.0))
        await asyncio.sleep(0.1)
        redis.Redis(port=old).replicaof("127.0.0.1", new)
        proxy.target = new
        await queue.publish([b"new"])
        received = await waiting or await read(queue)
        assert [each.payload for each in received] == [b"new"]
        await queue.close()


@EVERY_CALL
async def test_a_replica_is_rejected_and_its_primary_named(servers: RedisServers, call) -> None:
    primary = servers.start()
    replica = servers.start("--replicaof", f"127.0.0.1 {primary}")
    error = await problem_of(make_queue(replica), call)
    assert "is a read-only replica" in error.message
    assert f"127.0.0.1:{primary}" in error.remedy


async def test_a_half_open_connection_is_found_and_replaced(servers: RedisServers) -> None:
    async with Proxy(servers.start()).open() as proxy:
        queue = make_queue(proxy.port)
        await queue.publish([b"1"])
        proxy.is_mute = True  # open connections hang at their next byte
        hanging = asyncio.create_task(queue.publish([b"2"]))
        await asyncio.sleep(0.2)
        proxy.is_mute = False
        await asyncio.wait_for(hanging, 60)
        assert (await queue.depth()).num_entries >= 2
        await queue.close()


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-lfu", "allkeys-random"])
async def test_publishing_is_rejected_where_any_key_may_be_evicted(servers: RedisServers, policy: str) -> None:
    port = servers.start("--maxmemory", "64mb", "--maxmemory-policy", policy)
    queue = make_queue(port)
    for call in (publish, lambda queue: queue.replay(["1-1"])):
        with pytest.raises(BackendDown, match=policy) as caught:
            await call(queue)
        assert "noeviction" in caught.value.remedy
    assert policy in (await queue.depth()).problem
    assert await read(queue) == []  # reading is still possible
    redis.Redis(port=port).config_set("maxmemory-policy", "noeviction")
    await queue.close()
    repaired = make_queue(port)
    await repaired.publish([b"x"])
    assert (await repaired.depth()).problem == ""
    await repaired.close()


@pytest.mark.parametrize("policy", ["noeviction", "volatile-lru", "volatile-ttl"])
async def test_publishing_works_where_its_keys_are_not_evicted(servers: RedisServers, policy: str) -> None:
    queue = make_queue(servers.start("--maxmemory", "64mb", "--maxmemory-policy", policy, *DURABLE))
    await queue.publish([b"x"])
    found = await queue.depth()
    assert (found.problem, found.warnings) == ("", ())
    await queue.close()


@pytest.mark.parametrize(
    ("arguments", "warning"),
    [
        ((), 'appendonly no, save ""'),
        (("--save", "60 1"), "appendonly no"),
        (("--appendonly", "yes", "--appendfsync", "everysec"), "appendfsync everysec"),
        (("--appendonly", "yes", "--appendfsync", "no"), "appendfsync no"),
        ((*DURABLE, "--maxmemory", "2mb"), "maxmemory 2097152 bytes"),
        ((*DURABLE, "--maxmemory-policy", "allkeys-lru"), "maxmemory-policy allkeys-lru"),
    ],
)
async def test_settings_that_may_lose_labels_give_a_warning(servers: RedisServers, arguments, warning: str) -> None:
    queue = make_queue(servers.start(*arguments))
    (found,) = (await queue.depth()).warnings
    assert warning in found
    await queue.close()


@EVERY_CALL
@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ("+@all -@scripting", "'eval'"),
        ("+@all -eval", "'eval'"),
        ("+@all -memory", "memory|usage"),
        ("+@all -xack", "'xack'"),
        ("+@all -xtrim", "'xtrim'"),
        ("+@all -xautoclaim", "'xautoclaim'"),
        ("+@all -xreadgroup", "'xreadgroup'"),
        ("+@all -xgroup", "'xgroup|create'"),
        ("+@all -@write", "XADD"),
    ],
)
async def test_missing_permissions_are_named(servers: RedisServers, call, rules: str, named: str) -> None:
    port = servers.start()
    redis.Redis(port=port).execute_command("ACL", "SETUSER", "poise", "on", ">pw", "~*", "&*", *rules.split())
    error = await problem_of(make_queue(port, user="poise:pw@"), call)
    assert named in error.message
    assert "+@scripting" in error.remedy


@pytest.mark.parametrize("pattern", ["~poise:*", f"~{STREAM}", f"~{LETTERS}"])
async def test_keys_without_permission_are_named(servers: RedisServers, pattern: str) -> None:
    port = servers.start()
    redis.Redis(port=port).execute_command("ACL", "SETUSER", "poise", "on", ">pw", pattern, "+@all")
    error = await problem_of(make_queue(port, user="poise:pw@"), publish)
    assert f"~{STREAM}" in error.remedy
    assert f"~{LETTERS}" in error.remedy


async def test_the_permissions_in_the_remedy_suffice(servers: RedisServers) -> None:
    port = servers.start()
    server = redis.Redis(port=port)
    server.execute_command("ACL", "SETUSER", "poise", "on", ">pw", "+@connection")
    error = await problem_of(make_queue(port, user="poise:pw@"), publish)
    granted = re.findall(r"[+~]\S+[^\s.]", error.remedy)
    server.execute_command("ACL", "SETUSER", "poise", *granted)
    queue = make_queue(port, user="poise:pw@")
    await queue.publish([b"poison", b"good"])
    poison, good = await read(queue)
    await queue.dead_letter(poison, "poison")
    await queue.ack([good.entry_id])
    (letter,) = await queue.dead_letters(max_entries=9)
    await queue.replay([letter.letter_id])
    assert await queue.has_unacked_up_to(str(await queue.newest_unacked()))
    assert (await queue.depth()).num_entries == 1
    assert await queue.discard([letter.letter_id]) == 0
    await queue.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"other": "fields"},
        {"is_whole": "1"},
        {"group": b"\xff", "reason": b"\xff", "entry_id": b"\xff", "is_whole": "0"},
    ],
)
async def test_letters_of_another_program_are_listed(servers: RedisServers, fields) -> None:
    server = redis.Redis(port=(port := servers.start()))
    server.xadd(LETTERS, fields)
    queue = make_queue(port)
    (letter,) = await queue.dead_letters(max_entries=9)
    assert not letter.is_whole
    with pytest.raises(InvalidRequest, match="cannot be replayed"):
        await queue.replay([letter.letter_id])
    assert await queue.discard([letter.letter_id]) == 1
    await queue.close()


@pytest.mark.parametrize("user", ["", ":wrong@", "nobody:pw@"])
async def test_a_wrong_password_names_the_setting_but_no_secret(servers: RedisServers, user: str) -> None:
    error = await problem_of(make_queue(servers.start("--requirepass", "s3cret"), user=user), publish)
    assert "redis://user:password@" in error.remedy
    assert "wrong" not in error.message.replace("WRONGPASS", "")


@pytest.mark.parametrize("key", [STREAM, LETTERS])
@pytest.mark.parametrize("kind", ["string", "list", "hash"])
async def test_a_key_of_another_type_is_named(servers: RedisServers, key: str, kind: str) -> None:
    server = redis.Redis(port=(port := servers.start()))
    {"string": server.set, "list": server.rpush}.get(kind, lambda name, value: server.hset(name, value, value))(
        key, "x"
    )
    error = await problem_of(make_queue(port), publish)
    assert f"has a {kind} at key '{key}'" in error.message
    assert "queue.stream" in error.remedy


async def test_too_few_replicas_are_named(servers: RedisServers) -> None:
    error = await problem_of(make_queue(servers.start("--min-replicas-to-write", "2")), publish)
    assert "min-replicas-to-write" in error.remedy


async def test_an_unknown_command_of_the_server_is_named(servers: RedisServers) -> None:
    error = await problem_of(make_queue(servers.start("--rename-command", "XAUTOCLAIM", "")), read)
    assert "XAUTOCLAIM" in error.message
    assert "6.2" in error.remedy


async def test_a_dead_letter_that_does_not_fit_is_reported(servers: RedisServers) -> None:
    queue = make_queue(servers.start("--maxmemory", "4mb"), max_bytes=64 << 20)
    with pytest.raises(QueueFull):
        for _ in range(1000):
            await queue.publish([b"x" * 100_000])
    first, *others = await read(queue)
    with pytest.raises(QueueFull) as caught:
        await queue.dead_letter(first, "poison")
    assert "maxmemory" in caught.value.remedy
    await queue.ack([each.entry_id for each in others])
    await queue.dead_letter(first, "poison")
    await queue.close()


# Losses.


def delete(server: redis.Redis) -> None:
    server.delete(STREAM)


def flush(server: redis.Redis) -> None:
    server.flushall()


def restore_older(server: redis.Redis) -> None:
    older = server.dump(STREAM)
    server.xadd(STREAM, {"group": "x"})
    server.restore(STREAM, 0, older, replace=True)
    server.xadd("elsewhere", {"a": "b"})


def trim(server: redis.Redis) -> None:
    server.xtrim(STREAM, maxlen=1, approximate=False)


def delete_one(server: redis.Redis) -> None:
    server.xdel(STREAM, server.xrange(STREAM)[1][0])


def make_anew(server: redis.Redis) -> None:
    server.delete(STREAM)
    server.xadd(STREAM, {"group": "x"})


@pytest.mark.parametrize("lose", [delete, flush, trim, delete_one, make_anew])
@pytest.mark.parametrize("were_read", [True, False])
async def test_labels_that_the_server_lost_are_reported_once(servers: RedisServers, lose, were_read: bool) -> None:
    server = redis.Redis(port=(port := servers.start()))
    queue = make_queue(port)
    await queue.publish([b"0"])
    await queue.ack([each.entry_id for each in await read(queue)])
    await queue.publish([b"1", b"2", b"3"])
    if were_read:
        assert len(await read(queue)) == 3
    assert (await queue.depth()).num_losses == 0
    lose(server)
    found = await queue.depth()
    assert found.num_losses == 1
    assert "lost labels" in found.last_loss
    await queue.publish([b"later"])  # the queue still works
    payloads = [each.payload for _ in range(2) for each in await read(queue)]
    assert b"later" in payloads
    assert (await queue.depth()).num_losses == 1
    await queue.close()


async def test_a_server_restored_from_older_data_is_reported(servers: RedisServers) -> None:
    server = redis.Redis(port=(port := servers.start()))
    queue = make_queue(port)
    await queue.publish([b"1"])
    older = server.dump(STREAM)
    await queue.publish([b"2"])
    server.restore(STREAM, 0, older, replace=True)
    found = await queue.depth()
    assert found.num_losses == 1
    assert "older data" in found.last_loss
    await queue.close()


@pytest.mark.parametrize("lose", [delete, flush])
async def test_a_loss_during_downtime_is_reported(servers: RedisServers, lose) -> None:
    server = redis.Redis(port=(port := servers.start()))
    queue = make_queue(port)
    await queue.publish([b"1"])
    (delivery,) = await read(queue)
    await queue.ack([delivery.entry_id])
    await queue.close()
    lose(server)
    restarted = make_queue(port)
    restarted.expect_at_least(delivery.entry_id)
    assert (await restarted.depth()).num_losses == 1
    await restarted.close()


@pytest.mark.parametrize("seed", range(3))
async def test_normal_operation_reports_no_loss(servers: RedisServers, seed: int) -> None:
    port, chance = servers.start(), random.Random(seed)
    queues = [make_queue(port, consumer=name, claim_idle_s=0.05) for name in ("a", "b")]
    for _ in range(150):
        queue = chance.choice(queues)
        match chance.randrange(4):
            case 0:
                await queue.publish([b"x"] * chance.randint(1, 5))
            case 1 | 2:
                deliveries = await queue.read(max_entries=chance.randint(1, 6), wait_s=0.001)
                for delivery in chance.sample(deliveries, chance.randint(0, len(deliveries))):
                    if chance.random() < 0.3:
                        await queue.dead_letter(delivery, "poison")
                    else:
                        await queue.ack([delivery.entry_id])
            case 3:
                letters = await queue.dead_letters(max_entries=2)
                await queue.replay([letter.letter_id for letter in letters])
        assert (await queue.depth()).num_losses == 0, (await queue.depth()).last_loss
    for queue in queues:
        await queue.close()


async def test_dead_letters_of_earlier_releases_are_moved(servers: RedisServers) -> None:
    server = redis.Redis(port=(port := servers.start()))
    fields = {"group": "payload", "reason": "poison", "entry_id": "1-1", "is_whole": "1"}
    former = f"{STREAM}:dead"
    server.xadd(former, fields)
    queue = make_queue(port)
    (letter,) = await queue.dead_letters(max_entries=9)
    assert letter.payload == b"payload"
    await queue.close()
    server.xadd(former, fields | {"group": "of a release that was rolled back"})
    queue = make_queue(port)
    assert len(await queue.dead_letters(max_entries=9)) == 2
    assert not server.exists(former)
    await queue.replay([letter.letter_id])
    await queue.close()


# Clusters.


async def test_every_node_of_a_cluster_redirects_to_the_labels(servers: RedisServers) -> None:
    for port in servers.cluster(3):
        queue = make_queue(port)
        await queue.publish([b"poison", b"good"])
        poison, good = await read(queue)
        await queue.dead_letter(poison, "poison")
        await queue.ack([good.entry_id])
        (letter, *_) = await queue.dead_letters(max_entries=9)
        await queue.replay([letter.letter_id])
        (again,) = await read(queue)
        await queue.ack([again.entry_id])
        assert (await queue.depth()).num_entries == 0
        await queue.close()


async def test_the_queue_follows_its_slot_to_another_node(servers: RedisServers) -> None:
    ports = servers.cluster(2)
    nodes = [redis.Redis(port=port, decode_responses=True) for port in ports]
    ids = [node.execute_command("CLUSTER", "MYID") for node in nodes]
    slot = nodes[0].execute_command("CLUSTER", "KEYSLOT", STREAM)
    queue = make_queue(ports[0])
    await queue.publish([b"1"])
    source = next(index for index, node in enumerate(nodes) if node.execute_command("CLUSTER", "COUNTKEYSINSLOT", slot))
    target = 1 - source
    nodes[target].execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
    nodes[source].execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
    for key in nodes[source].execute_command("CLUSTER", "GETKEYSINSLOT", slot, 10):
        nodes[source].execute_command("MIGRATE", "127.0.0.1", ports[target], key, 0, 5000)
    for node in (nodes[target], nodes[source]):
        node.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
    await queue.publish([b"2"])
    assert [each.payload for each in await read(queue)] == [b"1", b"2"]
    assert (await queue.depth()).num_losses == 0
    await queue.close()


async def test_a_slot_without_a_node_is_named(servers: RedisServers) -> None:
    error = await problem_of(make_queue(servers.start("--cluster-enabled", "yes", port=port_with_bus())), publish)
    assert "Repair the cluster" in error.remedy
