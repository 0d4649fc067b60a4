"""Copies between two memories that this process has mapped, whatever they are made of. Without torch: donors do them, too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from vcache.errors import UnavailableError
from vcache.memory.base import Memory, is_host
from vcache.memory.cuda import CudaMemory
from vcache.memory.cuda_driver import call, driver, on_device
from vcache.memory.cuda_words import copy, torch_uses_gpus
from vcache.memory.host import HostMemory

if TYPE_CHECKING:
    import torch

#: Streams that nobody is on, by GPU; as many as ever were in use at a time. None is ever destroyed: torch's allocator knows them.
_idle_streams: Final[defaultdict[int, list[Any]]] = defaultdict(list)


def copy_between(source: Memory, start: int, target: Memory, to: int, nbytes: int) -> None:
    """Copies ``nbytes`` from ``start`` of one to ``to`` of the other. Done on return."""
    if isinstance(source, HostMemory) and isinstance(target, HostMemory):
        np.copyto(target.array[to : to + nbytes], source.array[start : start + nbytes])  # lets other threads run
        return
    ordinal = next(memory.ordinal for memory in (source, target) if isinstance(memory, CudaMemory))
    copy(source.address + start, target.address + to, nbytes, ordinal=ordinal)


def aside(memory: Memory) -> AbstractContextManager[object]:
    """As ``aside_on``, for what is copied from or to ``memory``. A process in which torch computes nothing needs no other stream."""
    if is_host(memory.device) or not torch_uses_gpus():
        return nullcontext()
    return aside_on(memory.tensor.device)


def aside_on(device: torch.device | None) -> AbstractContextManager[object]:
    """On a GPU, a stream of its own: copies neither queue behind, nor hold up, what the engine computes.

    Nor do what torch allocates and waits for meanwhile, by this thread, spoil a graph that another thread captures.
    """
    if device is None or device.type != "cuda":
        return nullcontext()
    return _on_stream_of_its_own(device)


@contextmanager
def _on_stream_of_its_own(device: torch.device) -> Iterator[None]:
    import torch

    ordinal = device.index or 0
    try:
        driver()
    except UnavailableError:  # no bindings of the driver: torch alone copies from and to host segments
        with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
            yield
        return
    with on_device(ordinal):
        idle = _idle_streams[ordinal]
        try:
            stream = idle.pop()
        except IndexError:
            stream = _new_stream(device)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            idle.append(stream)


def _new_stream(device: torch.device) -> Any:
    """Of the driver: those of torch come round again, to somebody who captures a graph on his, or computes there."""
    import torch

    made = call("cuStreamCreate", driver().CUstream_flags.CU_STREAM_NON_BLOCKING)
    return torch.cuda.ExternalStream(int(made), device=device)  # type: ignore[no-untyped-call]
