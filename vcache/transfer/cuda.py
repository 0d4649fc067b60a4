"""Enqueues the copy kernels on the caller's stream. Nothing here waits for the device.

A call's block ids and payload addresses travel through a room of ``arguments.py``.
"""

from __future__ import annotations

from threading import Lock
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
import torch

from vcache.memory.copying import aside_on
from vcache.paged_kv import PagedKV
from vcache.transfer import triton_kernels
from vcache.transfer.arguments import rooms_of
from vcache.transfer.checks import CheckedCopy, Int64Array, check_gather, check_one_kind, check_scatter
from vcache.transfer.events import on
from vcache.transfer.triton_kernels import PlaneTable

#: Enough 128-thread programs to fill a multiprocessor; each moves many tiles, so that a launch costs the same at any size.
PROGRAMS_PER_MULTIPROCESSOR: Final = 16


def gather(
    kv: PagedKV,
    block_ids: Int64Array,
    segment: torch.Tensor,
    offsets: Int64Array,
    *,
    wanted: torch.Tensor | None = None,
) -> None:
    """Enqueue the copy of blocks into payloads on the current stream of the planes' device. See ``vcache.transfer.gather``.

    ``wanted``: int64 ``[chunks]`` on that device, 0 for the chunks of which nothing is to be written; read when the copy runs.
    """
    copy = check_gather(kv, block_ids, segment, offsets)
    _enqueue(triton_kernels.gather, kv, copy, segment, wanted)


def scatter(kv: PagedKV, block_ids: Int64Array, segment: torch.Tensor, offsets: Int64Array) -> None:
    """Enqueue the copy of payloads into blocks on the current stream of the planes' device. See ``vcache.transfer.scatter``."""
    copy = check_scatter(kv, block_ids, segment, offsets)
    _enqueue(triton_kernels.scatter, kv, copy, segment)


def compile_for(kv: PagedKV) -> None:
    """Has ready what copies of these planes need: their kernels are compiled, which takes seconds where nobody has done so before."""
    with on(kv.device):
        _launcher(kv)


class _Launcher:
    """What is made once for a ``PagedKV``: its plane table, the kernels for it, and the number of programs."""

    def __init__(self, kv: PagedKV) -> None:
        with aside_on(kv.device):  # the table is waited for: not behind what the engine computes
            self.table = PlaneTable(kv)
            triton_kernels.compile_for(self.table)
        self.programs = PROGRAMS_PER_MULTIPROCESSOR
        if kv.device.type == "cuda":  # else under Triton's interpreter
            self.programs *= torch.cuda.get_device_properties(kv.device).multi_processor_count


_launchers: WeakKeyDictionary[PagedKV, _Launcher] = WeakKeyDictionary()
_launchers_lock = Lock()


def _launcher(kv: PagedKV) -> _Launcher:
    with _launchers_lock:
        launcher = _launchers.get(kv)
        if launcher is None:  # by one thread at a time: Triton's first launch of a kernel is not for several
            launcher = _launchers[kv] = _Launcher(kv)
        return launcher


def _enqueue(
    launch: triton_kernels.Launch,
    kv: PagedKV,
    copy: CheckedCopy,
    segment: torch.Tensor,
    wanted: torch.Tensor | None = None,
) -> None:
    check_one_kind(kv, segment)
    if copy.nbytes == 0:
        return
    ids, payloads = copy.block_ids, copy.offsets + segment.data_ptr()
    count = ids.size + payloads.size
    # The planes' device, not the segment's: torch labels memory opened over IPC with its exporter's.
    with on(kv.device):
        launcher, rooms = _launcher(kv), rooms_of(kv.device)
        room = rooms.take(count)
        try:
            room.words[: ids.size] = ids.ravel()
            room.words[ids.size : count] = payloads
            arguments = room.on_device[:count]  # read by every program: not over the bus each time
            arguments.copy_(room.pinned[:count], non_blocking=True)
            launch(
                launcher.table,
                arguments[: ids.size].view(ids.shape),
                arguments[ids.size :],
                int(np.gcd.reduce(payloads)),
                launcher.programs,
                wanted,
            )
        finally:
            room.done.record()
            rooms.give_back(room, launcher)  # whose table is memory of another stream
