"""VRAM beside torch: what a donor takes of a GPU, tensors over its memory, and graphs that are captured meanwhile. Needs a GPU."""

from __future__ import annotations

import secrets
import threading

import numpy as np
import pytest
import torch

from vcache.devices import device_name
from vcache.memory.copying import aside, copy_between
from vcache.memory.cuda import CudaMemory
from vcache.memory.cuda_driver import can_read, device_count, device_uuid
from vcache.memory.host import HostMemory
from vcache.pool.runtime_dir import RuntimeDir

pytestmark = pytest.mark.cuda

MIB = 1 << 20


@pytest.fixture
def runtime(runtime_dir):
    return RuntimeDir(runtime_dir)


@pytest.fixture
def allocate(runtime):
    made = []

    def one(kind="auto", *, nbytes=MIB):
        made.append(CudaMemory.create(runtime, secrets.token_bytes(16), nbytes, device="cuda:0", handles=kind))
        return made[-1]

    yield one
    torch.cuda.synchronize()
    for memory in made:
        memory.close()


def test_devices_have_the_names_that_torch_gives_them():
    assert device_count() == torch.cuda.device_count()
    for ordinal in range(device_count()):
        assert device_uuid(ordinal) == device_name(torch.device("cuda", ordinal))


@pytest.mark.parametrize("kind", ["vmm", "ipc"])
def test_torch_computes_on_it_where_it_lies(allocate, kind):
    memory = allocate(kind)
    tensor = memory.tensor
    assert (tensor.device, tensor.data_ptr()) == (torch.device("cuda", 0), memory.address)
    tensor.view(torch.int64)[5] = 55
    assert memory.words.load(5) == 55
    memory.words.store(6, 66)
    assert tensor.view(torch.int64)[6].item() == 66
    assert torch.equal(tensor.cpu(), tensor.clone().cpu())


def test_a_tensor_of_opened_memory_is_on_the_device_that_reads(allocate, runtime):
    memory = allocate("vmm")
    memory.words.store(1, 11)
    memory.words.fence()
    for reader in range(device_count()):
        if can_read(reader, 0):
            opened = CudaMemory.open(runtime, memory.handle, MIB, device=memory.device, reader=f"cuda:{reader}")
            tensor = opened.tensor
            assert tensor.device == torch.device("cuda", reader)
            assert (tensor.view(torch.int64)[:3] + 0).tolist() == [0, 11, 0]
            torch.cuda.synchronize(reader)
            opened.close()


def test_a_donor_takes_its_segment_and_a_bare_context(runtime_dir, processes):
    def used():
        free, total = torch.cuda.mem_get_info(0)
        return total - free

    before = used()
    nbytes = 256 * MIB
    donor = processes.python("-m", "tests.memory.vram_process", str(runtime_dir))
    donor.tell(f"create auto cuda:0 {nbytes}")
    assert donor.line().startswith("made")
    assert nbytes <= used() - before < nbytes + 1024 * MIB


def test_what_goes_aside_is_on_one_stream_that_torch_gives_to_nobody_else(allocate):
    memory = allocate()
    assert not memory.tensor.any()
    taken = set()
    for _ in range(3):
        with aside(memory):
            taken.add(torch.cuda.current_stream().cuda_stream)
            assert int(torch.ones(1024, device="cuda:0").sum()) == 1024
    with aside(memory), aside(memory):
        taken.add(torch.cuda.current_stream().cuda_stream)
    assert len(taken) == 2
    assert taken.isdisjoint(torch.cuda.Stream().cuda_stream for _ in range(64))


@pytest.mark.parametrize("kind", ["vmm", "ipc"])
def test_a_capture_in_global_mode_survives_all_that_another_thread_does_with_memory(allocate, runtime, kind):
    host = HostMemory.create(runtime, secrets.token_bytes(16), MIB)
    other = allocate(kind)
    errors = []

    def work():
        try:
            memory = CudaMemory.create(runtime, secrets.token_bytes(16), MIB, device="cuda:0", handles=kind)
            memory.words.store(3, 33)
            memory.words.fence()
            assert memory.words.load_each(np.array([3, 100, 9000])).tolist() == [33, 0, 0]
            with aside(memory):
                fresh = torch.ones(64 * MIB, dtype=torch.uint8, device="cuda:0")  # more than torch has in store
                assert int(fresh.sum(dtype=torch.int64)) == 64 * MIB
                copy_between(memory, 0, host, 0, MIB)
                copy_between(host, 0, other, 0, MIB)
            if kind == "vmm":
                opened = CudaMemory.open(runtime, memory.handle, MIB, device=memory.device)
                assert opened.words.load(3) == 33
                opened.close()
            memory.close()
        except BaseException as error:
            errors.append(error)

    numbers = torch.zeros(1024, device="cuda:0")
    numbers.add_(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="global"):
        numbers.add_(1)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(60)
        numbers.add_(1)
    assert not errors, errors
    graph.replay()
    torch.cuda.synchronize()
    assert numbers.eq(2).all()
    assert other.words.load(3) == 33
    host.close()
