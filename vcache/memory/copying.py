"""Copies between two memories that this process has mapped, whatever they are made of; host memory to host memory without torch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np

from vcache.memory.base import Memory, is_host
from vcache.memory.host import HostMemory


def copy_between(source: Memory, start: int, target: Memory, to: int, nbytes: int) -> None:
    """Copies ``nbytes`` from ``start`` of one to ``to`` of the other. Done on return, except between two GPUs' memories."""
    if isinstance(source, HostMemory) and isinstance(target, HostMemory):
        np.copyto(target.array[to : to + nbytes], source.array[start : start + nbytes])  # lets other threads run
    else:
        target.tensor[to : to + nbytes].copy_(source.tensor[start : start + nbytes])


def aside(memory: Memory) -> AbstractContextManager[object]:
    """For a GPU's memory, a stream of its own: copies neither queue behind, nor hold up, what the engine computes."""
    if is_host(memory.device):
        return nullcontext()
    import torch

    return torch.cuda.stream(torch.cuda.Stream(memory.tensor.device))  # type: ignore[no-untyped-call]
