"""Enqueues the copy kernels on the caller's stream. Nothing here waits for the device.

A call's block ids and payload addresses travel through pinned memory that is used again once the kernel that read them is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
import torch

from vcache.paged_kv import PagedKV
from vcache.transfer import triton_kernels
from vcache.transfer.checks import CheckedCopy, Int64Array, check_gather, check_one_kind, check_scatter
from vcache.transfer.triton_kernels import PlaneTable

#: Enough 128-thread programs to fill a multiprocessor; each moves many tiles, so that a launch costs the same at any size.
PROGRAMS_PER_MULTIPROCESSOR: Final = 16


def gather(kv: PagedKV, block_ids: Int64Array, segment: torch.Tensor, offsets: Int64Array) -> None:
    """Enqueue the copy of blocks into payloads on the current stream of the planes' device. See ``vcache.transfer.gather``."""
    copy = check_gather(kv, block_ids, segment, offsets)
    _enqueue(triton_kernels.gather, kv, copy, segment)


def scatter(kv: PagedKV, block_ids: Int64Array, segment: torch.Tensor, offsets: Int64Array) -> None:
    """Enqueue the copy of payloads into blocks on the current stream of the planes' device. See ``vcache.transfer.scatter``."""
    copy = check_scatter(kv, block_ids, segment, offsets)
    _enqueue(triton_kernels.scatter, kv, copy, segment)


@dataclass(slots=True)
class _Arguments:
    """Room for one call's ids and addresses, in pinned memory and on the device; free when ``done`` has happened."""

    pinned: torch.Tensor
    on_device: torch.Tensor
    done: torch.cuda.Event


class _Launcher:
    """What is made once for a ``PagedKV``: its plane table, the number of programs, and the room for arguments."""

    def __init__(self, kv: PagedKV) -> None:
        self.table = PlaneTable(kv)
        properties = torch.cuda.get_device_properties(kv.device)
        self.programs: int = properties.multi_processor_count * PROGRAMS_PER_MULTIPROCESSOR
        self._rooms: list[_Arguments] = []
        self._lock = Lock()

    def take_room(self, count: int, device: torch.device) -> _Arguments:
        """Room for ``count`` words that no queued kernel still reads. Give it back once ``done`` has been recorded."""
        with self._lock:
            for index, room in enumerate(self._rooms):
                if len(room.pinned) >= count and room.done.query():  # type: ignore[no-untyped-call]
                    return self._rooms.pop(index)
        words = 1 << max(10, (count - 1).bit_length())
        return _Arguments(
            torch.empty(words, dtype=torch.int64, pin_memory=True),
            torch.empty(words, dtype=torch.int64, device=device),
            torch.cuda.Event(),  # type: ignore[no-untyped-call]
        )

    def give_back(self, room: _Arguments) -> None:
        with self._lock:
            self._rooms.append(room)


_launchers: WeakKeyDictionary[PagedKV, _Launcher] = WeakKeyDictionary()
_launchers_lock = Lock()


def _launcher(kv: PagedKV) -> _Launcher:
    with _launchers_lock:
        launcher = _launchers.get(kv)
        if launcher is None:
            launcher = _launchers[kv] = _Launcher(kv)
        return launcher


def _enqueue(launch: triton_kernels.Launch, kv: PagedKV, copy: CheckedCopy, segment: torch.Tensor) -> None:
    check_one_kind(kv, segment)
    if copy.nbytes == 0:
        return
    ids, payloads = copy.block_ids, copy.offsets + segment.data_ptr()
    # The planes' device, not the segment's: torch labels memory opened over IPC with its exporter's.
    with torch.cuda.device(kv.device):
        launcher = _launcher(kv)
        room = launcher.take_room(ids.size + payloads.size, kv.device)
        words = np.concatenate((ids.ravel(), payloads))
        room.pinned[: len(words)].copy_(torch.from_numpy(words))
        arguments = room.on_device[: len(words)]
        arguments.copy_(room.pinned[: len(words)], non_blocking=True)
        launch(
            launcher.table,
            arguments[: ids.size].view(ids.shape),
            arguments[ids.size :],
            int(np.gcd.reduce(payloads)),
            launcher.programs,
        )
        room.done.record()
    launcher.give_back(room)
