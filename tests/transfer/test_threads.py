"""The copying threads: they share the blocks, stop before the call returns, survive a fork and an unlucky thread."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.support.processes import PATIENCE_S, child_environment
from vcache.paged_kv import PagedKV
from vcache.transfer import cpu, gather, scatter, threads
from vcache.transfer.threads import default_threads, helpers, process_cpus
from vcache.transfer_config import MAX_THREADS

PLANES, BLOCKS, BLOCK_BYTES = 4, 64, 64 << 10


def _copied(seed: int = 1, *, copying_threads: int) -> None:
    """Stores 16 MiB as four payloads and loads them into other tensors: all of it has to be there."""
    tensors = [torch.randint(0, 256, (BLOCKS, BLOCK_BYTES), dtype=torch.uint8) for _ in range(PLANES)]
    others = [torch.zeros_like(tensor) for tensor in tensors]
    ids = np.random.default_rng(seed).permutation(BLOCKS).reshape(4, -1)
    payload_bytes = PLANES * BLOCK_BYTES * ids.shape[1]
    segment = torch.zeros(len(ids) * payload_bytes, dtype=torch.uint8)
    offsets = np.arange(len(ids)) * payload_bytes
    gather(PagedKV(tensors, block_size=1), ids, segment, offsets, threads=copying_threads)
    scatter(PagedKV(others, block_size=1), ids, segment, offsets, threads=copying_threads)
    assert all(map(torch.equal, tensors, others))


@pytest.mark.parametrize("count", [1, 2, 3, MAX_THREADS + 9])
def test_all_is_copied_by_however_many_threads(count: int) -> None:
    _copied(copying_threads=count)


def test_copies_at_the_same_time_share_the_helpers() -> None:
    with ThreadPoolExecutor(4) as callers:
        for copy in [callers.submit(_copied, seed, copying_threads=3) for seed in range(32)]:
            copy.result(PATIENCE_S)


def test_helpers_that_never_come_delay_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(threads, "_start", asked.append)
    monkeypatch.setattr(threads, "_helpers", 0)
    monkeypatch.setattr(cpu, "BYTES_PER_THREAD", 1)
    _copied(copying_threads=50)
    assert asked == [49, 49]


def test_a_copy_of_little_is_the_callers_own_business() -> None:
    program = """
import threading
import numpy as np, torch
from vcache.paged_kv import PagedKV
from vcache.transfer import gather
kv = PagedKV([torch.zeros(8, 64 << 10, dtype=torch.uint8)], block_size=1)
gather(kv, np.array([[0, 1]]), torch.zeros(1 << 20, dtype=torch.uint8), np.array([0]))
assert not [thread for thread in threading.enumerate() if "copy" in thread.name]
"""
    subprocess.run([sys.executable, "-c", program], env=child_environment(), check=True, timeout=PATIENCE_S)


def test_a_process_ends_with_its_helpers_waiting_and_a_fork_gets_its_own() -> None:
    program = """
import os
import torch
from tests.transfer.test_threads import _copied
from vcache.transfer import threads
torch.set_num_threads(1)  # torch's own threads do not survive a fork
_copied(copying_threads=3)
assert threads._helpers == 2
pid = os.fork()
if pid == 0:
    assert threads._helpers == 0
    _copied(copying_threads=2)
    assert threads._helpers == 1
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
"""
    subprocess.run(
        [sys.executable, "-W", "error", "-c", program], env=child_environment(), check=True, timeout=PATIENCE_S
    )


@pytest.mark.skipif(len(process_cpus()) < 2, reason="needs two CPUs")
def test_helpers_run_where_the_process_may_but_not_where_their_caller_does() -> None:
    program = """
import os, threading, time
from tests.transfer.test_threads import _copied
from vcache.transfer.threads import process_cpus
cpus = process_cpus()
deadline = time.monotonic() + 60
for mine in sorted(cpus)[:2]:
    os.sched_setaffinity(0, {mine})
    while True:  # the first copies may be over before the helper is there
        _copied(copying_threads=2)
        (helper,) = (thread for thread in threading.enumerate() if thread.name == "vcache-copy-0")
        if os.sched_getaffinity(helper.native_id) == cpus - {mine}:
            break
        assert time.monotonic() < deadline
"""
    subprocess.run([sys.executable, "-c", program], env=child_environment(), check=True, timeout=PATIENCE_S)


def test_a_thread_runs_where_the_process_may_not_where_its_maker_was_pinned() -> None:
    program = """
import os, threading
from vcache.transfer.threads import process_cpus, run_anywhere
cpus, seen = process_cpus(), []
os.sched_setaffinity(0, {min(cpus)})
thread = threading.Thread(target=lambda: (run_anywhere(), seen.append(os.sched_getaffinity(0))))
thread.start()
thread.join()
assert seen == [cpus]
"""
    subprocess.run([sys.executable, "-c", program], env=child_environment(), check=True, timeout=PATIENCE_S)


def test_the_number_of_threads_is_bounded() -> None:
    assert process_cpus() >= os.sched_getaffinity(0)
    assert 1 <= default_threads() <= 4
    assert (helpers(-1), helpers(0), helpers(1)) == (0, 0, 1)
