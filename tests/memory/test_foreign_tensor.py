"""Memory as a tensor: no copy, on the device that was said, described for as long as any view of it lives."""

from __future__ import annotations

import gc
import mmap

import numpy as np
import pytest
import torch

from vcache.memory.foreign_tensor import tensor_over

MIB = 1 << 20


def test_it_is_the_memory_itself():
    memory = np.arange(4096, dtype=np.uint8)
    tensor = tensor_over(memory.ctypes.data, memory.nbytes, cuda_ordinal=None)
    assert (tensor.dtype, tensor.shape, tensor.device.type) == (torch.uint8, (4096,), "cpu")
    assert tensor.data_ptr() == memory.ctypes.data and tensor.is_contiguous()
    tensor[7] = 99
    assert memory[7] == 99
    words = tensor[8:].view(torch.int64)
    del tensor
    gc.collect()
    memory[8] = 5
    assert words[0].item() & 0xFF == 5


def test_descriptions_are_given_back():
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    address = int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)

    def make(count):
        for _ in range(count):
            tensor_over(address, mmap.PAGESIZE, cuda_ordinal=None)

    def resident():
        with open("/proc/self/statm", encoding="ascii") as numbers:
            return int(numbers.read().split()[1]) * mmap.PAGESIZE

    make(1000)
    before = resident()
    make(50_000)  # of some hundred bytes each
    assert resident() - before < 2 * MIB


def test_made_in_inference_mode_it_can_be_written_outside_of_it():
    memory = np.arange(4096, dtype=np.uint8)
    with torch.inference_mode():
        tensor = tensor_over(memory.ctypes.data, memory.nbytes, cuda_ordinal=None)
    tensor.fill_(5)
    assert (memory == 5).all()


@pytest.mark.cuda
def test_vram_is_on_the_device_that_was_said_and_is_not_copied():
    memory = torch.arange(256, dtype=torch.uint8, device="cuda:0")
    for ordinal in range(torch.cuda.device_count()):
        tensor = tensor_over(memory.data_ptr(), memory.nbytes, cuda_ordinal=ordinal)
        assert tensor.device == torch.device("cuda", ordinal)
        assert tensor.data_ptr() == memory.data_ptr()
    first = tensor_over(memory.data_ptr(), memory.nbytes, cuda_ordinal=0)
    first.fill_(3)
    assert memory.eq(3).all()
