# SPDX-License-Identifier: Apache-2.0
"""Whether every node of a Redis can be trusted with guests' memory, found out by asking and by trying. Blocks."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any

from tierd.store import StoreError
from tierd.store.redis_link import Address, Link, RedisOptions
from tierd.store.redis_nodes import Command, Nodes, Run, Words

VERSION_MIN = (6, 2)
OTHERWISE = "let replicas confirm each write (replicas: 1), or accept the loss with allow_volatile: true"
TRIAL = b"tierd tries whether this comes back"
TRIAL_MS = 60_000
NOBODY = (1 << 63) - 1  # an id that no client will have
TRIAL_KEYS_MAX = 10_000  # by then every node had a key, unless it has hardly any slot


def probe(options: RedisOptions, nodes: Nodes, link: Link, scratch_key: str, confirm: Words) -> None:
    """StoreError says why and what to do. A server that is full is none: it is written again when there is room."""
    try:
        nodes.refresh()
        for address in nodes.all():
            _ask(options, address, link)
        for address in nodes.all():
            _try(nodes, address, link, scratch_key, confirm)
    except OSError as error:
        raise StoreError(error.strerror) from error


def _ask(options: RedisOptions, address: Address, link: Link) -> None:
    info = link.call(address, "INFO")
    for trouble in (_server, _replicas):
        if text := trouble(options, info):
            raise StoreError(f"{address} {text}")
    if options.mode == "cluster":
        _cluster(link.call(address, "CLUSTER INFO"), address)
    must_keep(options, address, link)


def must_keep(options: RedisOptions, address: Address, link: Link) -> bool:
    """OSError, StoreError: what is written to that node may be lost there. False: it is a replica now, and was not looked at.
    That, and whatever else is wrong with it or with others, a write itself finds out."""
    info = link.call(address, "INFO")
    if info["role"] != "master":
        return False
    for trouble in (_policy, _persistence):
        if text := trouble(options, info):
            raise StoreError(f"{address} {text}")
    if options.fsync:
        _fsync(address, link)
    elif not (options.replicas or options.allow_volatile):
        _always(address, link)
    return True


def _server(options: RedisOptions, info: Mapping[str, Any]) -> str | None:
    version = tuple(int(part) for part in str(info["redis_version"]).split(".")[:2])
    if version < VERSION_MIN:
        return f"is Redis {info['redis_version']}; tierd needs {'.'.join(map(str, VERSION_MIN))} or newer, or Valkey"
    if int(info["cluster_enabled"]) and options.mode != "cluster":
        return "is a node of a cluster; set mode: cluster"
    if not int(info["cluster_enabled"]) and options.mode == "cluster":
        return "is not a node of a cluster; set mode: single, or cluster-enabled yes there"
    if info["role"] != "master":
        return "is a replica; name its primary, or the sentinels with mode: sentinel"
    return "is still loading its data; wait until it is up" if int(info["loading"]) else None


def _policy(options: RedisOptions, info: Mapping[str, Any]) -> str | None:
    policy = info["maxmemory_policy"]
    if policy == "noeviction":
        return None
    return f"evicts keys when it is full (maxmemory-policy {policy}), which would lose guests' memory; set noeviction there"


def _persistence(options: RedisOptions, info: Mapping[str, Any]) -> str | None:
    if int(info["aof_enabled"]):
        status = info["aof_last_write_status"]
        return None if status == "ok" else f"cannot write its append-only file ({status}); see to its disk and its log"
    if options.fsync or not (options.allow_volatile or options.replicas):
        return f"keeps nothing when it is restarted, which would lose guests' memory; set appendonly yes there, or {OTHERWISE}"
    return None


def _replicas(options: RedisOptions, info: Mapping[str, Any]) -> str | None:
    have = int(info["connected_slaves"])
    if have >= options.replicas:
        return None
    return f"has {have} replicas, {options.replicas} have to confirm each write; connect more, or set replicas: {have}"


def _cluster(info: Mapping[str, Any], address: Address) -> None:
    if info["cluster_state"] != "ok" or int(info["cluster_slots_fail"]):
        raise StoreError(
            f"at {address} the cluster is not whole (cluster_state:{info['cluster_state']}, "
            f"{info['cluster_slots_fail']} slots failed); see `redis-cli --cluster check {address}`"
        )


def _fsync(address: Address, link: Link) -> None:
    try:
        link.call(address, "WAITAOF", 0, 0, 0)
    except OSError as error:
        if error.errno != errno.EIO:  # it cannot be reached
            raise
        raise StoreError(
            f"{address} has no WAITAOF ({error.strerror}); set fsync: false, or upgrade to Redis 7.2"
        ) from error


def _always(address: Address, link: Link) -> None:
    try:
        value = link.call(address, "CONFIG GET", "appendfsync")["appendfsync"]
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise StoreError(f"{address} does not say when it syncs ({error.strerror}); {OTHERWISE}") from error
    if value != "always":
        raise StoreError(
            f"{address} loses up to two seconds of guests' memory when it is killed (appendfsync {value}); "
            f"set appendfsync always there, or {OTHERWISE}"
        )


def _try(nodes: Nodes, address: Address, link: Link, scratch_key: str, confirm: Words) -> None:
    """Everything that is done later, once, on a key of that node."""
    numbered = (scratch_key.replace("{", f"{{{number}/") for number in range(TRIAL_KEYS_MAX))
    key = next(key for key in numbered if nodes.of(key) == address)
    run = Run(nodes, link)
    try:
        _, (record,) = run([Command("HSET", key, (0, TRIAL)), Command("HMGET", key, (0,))], confirm, together=True)
        if record != TRIAL:
            raise StoreError(f"{address}: what was written came back different; it is no store")
        looks = [Command("HGET", key, (0,)), Command("HGETALL", key), Command("HLEN", key)]
        run([Command("HSETNX", key, (1, TRIAL)), *looks, Command("HDEL", key, (0,)), Command("UNLINK", key)])
        lease = [Command("PTTL", key), Command("PEXPIRE", key, (TRIAL_MS,)), Command("UNLINK", key)]
        run([Command("SET", key, (b"", "PX", TRIAL_MS)), *lease])
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    link.call(address, "CLIENT LIST")
    link.call(address, "CLIENT KILL", "ID", NOBODY)
