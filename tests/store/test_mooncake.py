"""The Mooncake store against a real master and real owners: what is stored comes back; nothing is left behind."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.store.mooncake import HOST, await_ready, fill, free_port, wait_for
from tests.store.shards import blank, payload, payloads, shard, shards
from vcache.store.base import Got, Put
from vcache.store.guard import GuardedStore
from vcache.store.mooncake import MooncakeStore

NBYTES = 300_000


def companion_pid(store: GuardedStore) -> int:
    inner = store._store
    assert isinstance(inner, MooncakeStore)
    assert inner._process is not None
    return inner._process.pid


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_was_stored_comes_back_also_to_others(mooncake, opened):
    mooncake.start_master()
    mooncake.start_owner()
    store = opened()
    await_ready(store)
    assert list(store.put_from(shards(5), payloads(5, NBYTES))) == [Put.STORED] * 5
    assert list(store.put_from(shards(6), payloads(6, NBYTES))) == [Put.EXISTS] * 5 + [Put.STORED]
    other = opened()
    await_ready(other)
    assert list(other.contains(shards(7))) == [True] * 6 + [False]
    buffers = blank(7, NBYTES)
    assert list(other.get_into(shards(7), buffers)) == [Got.LOADED] * 6 + [Got.ABSENT]
    assert all(torch.equal(buffers[number], payload(number, NBYTES)) for number in range(6))
    assert other.remove(shards(3)) == 3
    assert list(store.contains(shards(4))) == [False] * 3 + [True]
    assert store.staging.free_bytes == store.staging.nbytes


def test_a_large_batch_arrives_in_parts(mooncake, opened):
    count, size = 40, 1 << 20
    mooncake.start_master()
    mooncake.start_owner()
    store = opened({"timeout": 30.0, "write_timeout": 30.0})
    await_ready(store)
    fill(store, count, size)
    seen: list[torch.Tensor] = []
    runs: list[int] = []

    def keep_more(got) -> None:
        seen.extend(got.buffer(index).clone() for index in range(len(seen), got.run))
        runs.append(len(seen))

    with store.load(shards(count), [size] * count, arrived=keep_more) as loaded:
        assert len(set(runs)) > 1, "all at once, or all at the end"
        assert loaded.run == count
        keep_more(loaded)
    assert all(torch.equal(found, payload(number, size)) for number, found in enumerate(seen))
    assert store.staging.free_bytes == store.staging.nbytes


@pytest.mark.parametrize("fault", ["killed", "suspended"])
def test_with_two_replicas_one_owner_that_goes_loses_nothing(mooncake, opened, fault):
    mooncake.start_master()
    owners = [mooncake.start_owner(), mooncake.start_owner()]
    store = opened(replicas=2, soft_pin=60)
    await_ready(store)
    fill(store, 8, NBYTES)
    if fault == "killed":
        owners[0].kill()
    else:
        owners[0].suspend()
    store.get_into(shards(8), blank(8, NBYTES))  # finds out
    buffers = blank(8, NBYTES)
    assert list(store.get_into(shards(8), buffers)) == [Got.LOADED] * 8, "the other owner is asked"
    assert all(torch.equal(buffers[number], payload(number, NBYTES)) for number in range(8))


def test_a_serving_process_may_own_memory_of_the_store(mooncake, opened):
    mooncake.start_master()
    _both_load_what_one_owns(opened(segment_size="64MiB"), opened())


def test_with_a_metadata_server_too(mooncake, opened):
    port = free_port()
    mooncake.start_master(
        "--enable_http_metadata_server=true",
        f"--http_metadata_server_host={HOST}",
        f"--http_metadata_server_port={port}",
    )
    metadata = f"http://{HOST}:{port}/metadata"
    _both_load_what_one_owns(opened(metadata=metadata, segment_size="64MiB"), opened(metadata=metadata))


def _both_load_what_one_owns(store: GuardedStore, other: GuardedStore) -> None:
    await_ready(store)
    await_ready(other)
    fill(store, 4, NBYTES)
    for reader in (store, other):
        buffers = blank(4, NBYTES)
        assert list(reader.get_into(shards(4), buffers)) == [Got.LOADED] * 4
        assert all(torch.equal(buffers[number], payload(number, NBYTES)) for number in range(4))


def test_another_layout_size_or_prefix_is_not_taken_for_ours(mooncake, opened):
    mooncake.start_master()
    mooncake.start_owner()
    store, prefix = opened(), opened(key_prefix="elsewhere")
    for each in (store, prefix):
        await_ready(each)
    fill(store, 2, NBYTES)
    assert list(prefix.contains(shards(2))) == [False, False]
    assert list(store.get_into([shard(0)], blank(1, NBYTES - 5))) == [Got.INVALID]
    assert list(store.get_into([shard(1)._replace(layout=1)], blank(1, NBYTES))) == [Got.INVALID]
    assert list(store.contains(shards(2))) == [False, False], "what was invalid is removed"


def test_a_process_that_ends_leaves_no_mooncake_process_behind(mooncake, processes):
    """Not even while its Mooncake process is stuck in ``setup``, with the GIL held."""
    master = mooncake.start_master()
    master.suspend()
    script = (
        "import sys, time\n"
        "from vcache.config import VCacheConfig\n"
        "from vcache.store import open_store\n"
        f"config = VCacheConfig(store={{'mooncake': {{'master': '{mooncake.address}'}}}})\n"
        "store = open_store(config.store)\n"
        "print(store._store._process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    child = processes.python("-c", script)
    pid = int(child.line())
    wait_for(lambda: "/mooncake/store." in Path(f"/proc/{pid}/maps").read_text(), "the import before setup")
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    wait_for(lambda: not is_running(pid), "the end of the Mooncake process")
    master.resume()


def test_no_master_at_start_costs_nothing_and_is_found_when_it_comes(mooncake, opened):
    store = opened()
    assert list(store.contains(shards(3))) == [False] * 3
    for _ in range(3):
        store.get_into(shards(1), blank(1))
    assert store.stats()["store_circuit"] == "open"
    assert (store.stats()["store_process_starts"], store.stats()["store_process_joins"]) == (1, 0)
    mooncake.start_master()
    mooncake.start_owner()
    wait_for(lambda: store.stats()["store_process_joins"], "the joining, which no call need find out")
    await_ready(store)
    fill(store, 2, NBYTES)
    assert store.stats()["store_circuit"] == "closed"


def test_other_threads_go_on_whatever_the_master_does(mooncake, opened):
    """Mooncake's ``setup`` against a hanging master holds the GIL of its process: it must not be this one."""
    master = mooncake.start_master()
    master.suspend()
    beats: list[float] = []
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.005):
            beats.append(time.monotonic())

    thread = threading.Thread(target=beat)
    thread.start()
    store = opened()
    for _ in range(200):  # one second of calls, in which setup hangs
        store.contains(shards(1))
        time.sleep(0.005)
    stop.set()
    thread.join()
    assert len(beats) > 20
    assert max(second - first for first, second in itertools.pairwise(beats)) < 0.5
    master.resume()
    await_ready(store)


def test_the_mooncake_process_killed_is_replaced(mooncake, opened):
    mooncake.start_master()
    mooncake.start_owner()
    store = opened()
    await_ready(store)
    fill(store, 2, NBYTES)
    os.kill(companion_pid(store), signal.SIGKILL)
    buffers = blank(2, NBYTES)
    assert list(store.get_into(shards(2), buffers)) == [Got.FAILED] * 2
    await_ready(store)
    assert list(store.get_into(shards(2), buffers)) == [Got.LOADED] * 2
    assert torch.equal(buffers[1], payload(1, NBYTES))
    assert (store.stats()["store_process_starts"], store.stats()["store_process_joins"]) == (2, 2)
    assert store.staging.free_bytes == store.staging.nbytes


def test_closing_ends_the_mooncake_process_during_traffic_too(mooncake, opened):
    mooncake.start_master()
    mooncake.start_owner()
    store = opened()
    await_ready(store)
    fill(store, 4, NBYTES)
    errors: list[BaseException] = []

    def traffic() -> None:
        try:
            for _ in range(300):
                buffers = blank(4, NBYTES)
                for number, got in enumerate(store.get_into(shards(4), buffers)):
                    assert got is not Got.LOADED or torch.equal(buffers[number], payload(number, NBYTES))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=traffic) for _ in range(2)]
    for thread in threads:
        thread.start()
    pid = companion_pid(store)
    store.close(timeout_s=10.0)
    for thread in threads:
        thread.join()
    assert not errors
    assert not is_running(pid)
    assert list(store.contains(shards(1))) == [False]


@pytest.mark.slow
def test_a_full_store_is_tried_again_then_dropped_and_counted(mooncake, opened):
    mooncake.start_master()
    mooncake.start_owner(nbytes=16 << 20)
    store = opened({"retries": 1, "retry_delay": 0.01})
    await_ready(store)
    results: list[Put] = []
    wait_for(
        lambda: results.extend(store.put_from(shards(40), payloads(40, 1 << 20))) or Put.FULL in results, "fullness"
    )
    assert store.stats()["store_retries"] >= 1
    assert store.stats()["store_full"] >= 1
    assert store.stats()["store_circuit"] == "closed"


@pytest.mark.slow
def test_vcache_mooncake_start_runs_a_store_and_ends_it(mooncake, processes, opened):
    port = mooncake.address.rpartition(":")[2]
    code = "from vcache.cli.mooncake import app; app()"
    child = processes.python(
        "-c", code, "start", "--port", port, "--metrics-port", str(free_port()), "--memory", "64MiB"
    )
    child.expect("Mooncake at")
    store = opened()
    await_ready(store)
    fill(store, 2, NBYTES)
    listening = subprocess.run(["ss", "-tlnpH"], capture_output=True, text=True, check=False).stdout
    assert f"{HOST}:{port}" in listening or not listening
    assert child.stop() == 0
    running = subprocess.run(
        [sys.executable, "-c", f"import socket; socket.create_connection(('{HOST}', {port}))"], check=False
    )
    assert running.returncode != 0
