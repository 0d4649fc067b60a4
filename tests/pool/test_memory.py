"""Memory: shared, zeroed, all there; refused with both numbers when it is not; safe to close under a user."""

from __future__ import annotations

import errno
import gc
import os
import platform
import secrets
import sys

import numpy as np
import pytest
import torch

from tests.support.processes import Processes
from vcache.errors import CapacityError, CorruptionError, UnavailableError
from vcache.memory import host
from vcache.memory.host import HostMemory
from vcache.pool.runtime_dir import RuntimeDir
from vcache.units import format_size

MIB = 1 << 20


@pytest.fixture
def runtime(runtime_dir):
    return RuntimeDir(runtime_dir)


@pytest.fixture
def memory(device, runtime):
    """2 MiB of host memory, then of VRAM."""
    if device.startswith("cuda"):
        from vcache.memory.cuda import CudaMemory

        made = CudaMemory.create(runtime, secrets.token_bytes(16), 2 * MIB, device=device)
    else:
        made = HostMemory.create(runtime, secrets.token_bytes(16), 2 * MIB, device=device)
    yield made
    made.close()


def host_memory(runtime, nbytes=MIB):
    return HostMemory.create(runtime, secrets.token_bytes(16), nbytes)


def test_it_is_zeroed_and_words_and_tensor_are_the_same_memory(memory):
    assert memory.tensor.numel() == memory.nbytes == 2 * MIB
    assert not memory.tensor.any()
    memory.words.store(3, 0x0102030405060708)
    memory.words.store_run(4, np.array([5, 6], dtype=np.uint64))
    memory.words.fence()
    assert memory.tensor[24:32].tolist() == [8, 7, 6, 5, 4, 3, 2, 1]
    memory.tensor[8] = 9
    assert memory.words.load(1) == 9
    assert memory.words.load_run(3, 3).tolist() == [0x0102030405060708, 5, 6]
    assert memory.words.load_each(np.array([[5, 4], [1, 0]])).tolist() == [[6, 5], [9, 0]]


def test_closing_twice_is_harmless_and_its_tensor_is_not_given_out_again(memory):
    memory.close()
    memory.close()
    with pytest.raises(UnavailableError, match="closed"):
        _ = memory.tensor


@pytest.mark.parametrize("nbytes", [0, -4096, 4097])
def test_a_size_that_is_not_whole_pages_is_refused(runtime, nbytes):
    with pytest.raises(ValueError, match="nbytes = .* multiple of"):
        host_memory(runtime, nbytes)


READER = """
import sys
from pathlib import Path
from vcache.memory.host import HostMemory
from vcache.pool.runtime_dir import RuntimeDir
memory = HostMemory.open(RuntimeDir(Path(sys.argv[1])), sys.argv[2].encode(), int(sys.argv[3]))
print("read", memory.words.load(2), flush=True)
memory.words.store(3, 77)
print("written", flush=True)
"""


def test_another_process_sees_the_same_bytes_and_its_end_leaves_the_memory_alone(runtime, processes: Processes):
    memory = host_memory(runtime)
    memory.words.store(2, 4711)
    child = processes.python("-c", READER, str(runtime.path), memory.handle.decode(), str(memory.nbytes))
    assert child.expect("read") == "read 4711"
    child.expect("written")
    assert child.wait() == 0
    assert memory.words.load(3) == 77
    assert (runtime.path / memory.handle.decode()).exists()
    memory.close()
    assert not (runtime.path / memory.handle.decode()).exists()


def test_a_tensor_over_it_made_in_inference_mode_can_be_written_outside_of_it(runtime):
    memory = host_memory(runtime)
    with torch.inference_mode():
        assert not memory.tensor.is_inference()
    memory.tensor[:8].fill_(5)
    memory.close()


def test_all_of_it_is_allocated_so_that_no_reader_can_be_killed_by_a_missing_page(runtime):
    memory = host_memory(runtime, 4 * MIB)
    status = os.stat(runtime.path / memory.handle.decode())
    assert status.st_blocks * 512 >= 4 * MIB
    memory.close()


def test_more_than_there_is_is_refused_with_both_numbers_before_anything_exists(runtime):
    status = os.statvfs(runtime.path)
    asked = status.f_frsize * status.f_blocks * 4
    with pytest.raises(CapacityError, match=rf"{format_size(asked)} was asked for, [1-9][\d.]* [KMGT]iB are free"):
        host_memory(runtime, asked)
    assert not list(runtime.path.glob("segment-*"))


def test_memory_that_runs_out_while_it_is_made_leaves_nothing(runtime, monkeypatch):
    def full(fd, offset, nbytes):
        os.stat(fd)  # the real thing, up to here
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(host.os, "posix_fallocate", full)
    with pytest.raises(CapacityError, match="1MiB was asked for"):
        host_memory(runtime)
    assert not list(runtime.path.glob("segment-*"))


def test_a_runtime_directory_on_a_disk_is_warned_of_one_in_shared_memory_is_not(runtime, tmp_path, caplog):
    if os.stat(tmp_path).st_dev == os.stat("/dev/shm").st_dev or not os.path.ismount("/dev/shm"):
        pytest.skip("no disk and no shared memory to tell apart")
    host_memory(runtime).close()
    assert caplog.text == ""
    host_memory(RuntimeDir(tmp_path / "on-disk")).close()
    assert f"runtime_dir = {tmp_path}/on-disk is on a disk" in caplog.text


def test_a_tensor_outlives_the_memorys_closing(runtime):
    memory = host_memory(runtime)
    tensor = memory.tensor
    part = tensor[4096:8192]
    part.fill_(5)
    del tensor
    memory.close()
    gc.collect()
    assert part.sum() == 5 * 4096  # still mapped: a late user reads stale bytes, and the process lives
    part.fill_(6)


def test_closing_unmaps_when_nobody_holds_a_tensor(runtime):
    memory = host_memory(runtime)
    name = memory.handle.decode()
    _ = memory.tensor.sum()
    with open("/proc/self/maps") as maps:
        assert name in maps.read()
    memory.close()
    gc.collect()
    with open("/proc/self/maps") as maps:
        assert name not in maps.read()


def test_an_owner_that_ends_without_closing_leaves_nothing(runtime, processes):
    program = (
        "import sys, os; from pathlib import Path; from vcache.memory.host import HostMemory\n"
        "from vcache.pool.runtime_dir import RuntimeDir\n"
        "memory = HostMemory.create(RuntimeDir(Path(sys.argv[1])), os.urandom(16), 1 << 20)\n"
        "if os.fork() == 0: sys.exit()\n"  # a forked child's end takes nothing away
        "os.wait(); print('there', os.path.exists(Path(sys.argv[1]) / memory.handle.decode()))\n"
    )
    child = processes.python("-c", program, str(runtime.path))
    assert child.expect("there") == "there True"
    assert child.wait() == 0
    assert not list(runtime.path.glob("segment-*"))


def test_a_segment_of_another_size_than_announced_is_not_mapped(runtime):
    memory = host_memory(runtime)
    with pytest.raises(CorruptionError, match=f"has {MIB} bytes, {2 * MIB} were announced"):
        HostMemory.open(runtime, memory.handle, 2 * MIB)
    memory.close()
    with pytest.raises(FileNotFoundError):
        HostMemory.open(runtime, memory.handle, MIB)


def test_pages_are_present_after_populate_and_closing_meanwhile_is_safe(runtime):
    memory = host_memory(runtime, 4 * MIB)
    opened = HostMemory.open(runtime, memory.handle, 4 * MIB)
    opened.populate()
    opened.close()
    opened.populate()
    memory.close()


def test_other_machines_than_x86_are_refused(runtime, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(UnavailableError, match="x86-64 only.*aarch64"):
        host_memory(runtime)
    assert not list(runtime.path.glob("segment-*"))


def test_vram_without_the_bindings_says_what_is_needed(runtime, monkeypatch):
    from vcache.memory.cuda import CudaMemory
    from vcache.memory.cuda_driver import driver

    driver.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(UnavailableError, match=r"pip install '\.\[cuda12\]' or '\.\[cuda13\]'"):
        CudaMemory.create(runtime, secrets.token_bytes(16), MIB, device="cuda:0")


@pytest.mark.skipif(os.path.exists("/proc/driver/nvidia"), reason="there is a driver here")
def test_vram_without_a_driver_says_so(runtime):
    from vcache.memory.cuda import CudaMemory

    with pytest.raises(UnavailableError, match="no NVIDIA driver|driver cannot be used"):
        CudaMemory.create(runtime, secrets.token_bytes(16), MIB, device="cuda:0")
