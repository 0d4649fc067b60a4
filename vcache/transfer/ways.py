"""The way bytes take between planes on one GPU and a segment on another: a kernel that reaches across, or the copy engine.

The kernel moves blocks to where they belong in one go; over some links it gets less out of them than a copy engine, which moves
whole payloads into a buffer beside the planes, from where a kernel of that GPU scatters them (``staged.py``). Which is faster is
measured once per pair of GPUs, when the first segment of the pair is mapped. On one GPU it is always the kernel. A store is
always the kernel's, too: what it must not write, because a record could not be marked, only the device knows by then.

torch does not know whose memory a peer's segment is (its tensor is one of the GPU that reads it): the way is told here.
"""

from __future__ import annotations

import logging
import statistics
import threading
from collections.abc import Callable
from enum import Enum
from typing import Final, NamedTuple

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from vcache.memory.copying import aside_on
from vcache.paged_kv import PagedKV
from vcache.transfer import staged
from vcache.transfer.checks import check_scatter

logger = logging.getLogger(__name__)

#: What a measurement reads, as one payload of blocks of this size; it takes as much memory twice on the GPU that reads.
PROBE_BYTES: Final = 8 << 20
PROBE_BLOCK_BYTES: Final = 64 << 10
_ROUNDS: Final = 5
#: About a millisecond of the device: long enough for the host to have enqueued what is measured.
_DELAY_CYCLES: Final = 2_000_000
#: The copy engine's way needs a buffer, so it has to be faster by more than measurements vary.
COPY_WORTH: Final = 0.95


class Way(Enum):
    """How bytes get from one GPU to another."""

    KERNEL = "kernel"
    COPY = "copy"


class Seconds(NamedTuple):
    """What the same bytes took either way."""

    kernel: float
    copy: float


def faster(measured: Seconds) -> Way:
    """The way to take."""
    return Way.COPY if measured.copy < COPY_WORTH * measured.kernel else Way.KERNEL


class PeerWays:
    """What was chosen for each pair (reader, owner) of GPUs, by UUID. Thread-safe."""

    def __init__(self) -> None:
        self._chosen: dict[tuple[str, str], Way] = {}
        self._lock = threading.Lock()

    def choose(self, reader: str, owner: str, *, setting: str, measure: Callable[[], Seconds]) -> Way:
        """The way of a pair: what ``transfer.peer_way`` says, or, if that is "auto", what ``measure`` found the first time."""
        if reader == owner:
            return Way.KERNEL
        if setting != "auto":
            return Way(setting)
        with self._lock:  # two measurements at a time would measure each other
            way = self._chosen.get((reader, owner))
            if way is None:
                found = measure()
                way = self._chosen[reader, owner] = faster(found)
                logger.info(
                    "%s reads memory of %s by %s: a kernel took %.0f us, a copy %.0f us",
                    reader, owner, way.value, found.kernel * 1e6, found.copy * 1e6,
                )  # fmt: skip
            return way


_PEERS: Final = PeerWays()
#: Tensors over segments that the copy engine reaches faster; all others are a kernel's.
_by_copy: Final = WeakTensorKeyDictionary()


def attach(segment: torch.Tensor, start: int, *, reader: str, owner: str, setting: str) -> None:
    """Settles the way to a segment that was mapped for ``reader``, a GPU; its payloads begin at ``start``. Nothing is written to it.

    May measure, which takes some milliseconds and waits for them: not for a thread that serves. Until it has returned, a
    kernel is used. ``segment`` must stay mapped meanwhile.
    """
    if _PEERS.choose(reader, owner, setting=setting, measure=lambda: measured(segment, start)) is Way.COPY:
        _by_copy[segment] = Way.COPY


def way_to(segment: torch.Tensor) -> Way:
    """What ``attach`` settled for this very tensor; a kernel for all others."""
    return Way.COPY if segment in _by_copy else Way.KERNEL


def measured(segment: torch.Tensor, start: int) -> Seconds:
    """Device time of a scatter from ``start`` of the segment by either way, on a stream of its own. Only reads the segment.

    What is read does not matter.
    """
    from vcache.transfer import cuda  # needs triton

    device = segment.device
    blocks = min(PROBE_BYTES, segment.numel() - start) // PROBE_BLOCK_BYTES
    ids, offsets = np.arange(blocks)[None, :], np.array([start])
    with aside_on(device):
        planes = torch.empty((max(1, blocks), PROBE_BLOCK_BYTES), dtype=torch.uint8, device=device)
        kv = PagedKV([planes], block_size=1)
        copy = check_scatter(kv, ids, segment, offsets)
        return Seconds(
            kernel=_device_seconds(lambda: cuda.scatter(kv, ids, segment, offsets)),
            copy=_device_seconds(lambda: staged.scatter(kv, copy, segment, cuda.scatter)),
        )


def _device_seconds(act: Callable[[], object]) -> float:
    """The median time between events around what ``act`` enqueues on the current stream, after a first time that does not count."""
    act()
    figures: list[float] = []
    for _ in range(_ROUNDS):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(_DELAY_CYCLES)  # type: ignore[no-untyped-call]
        begun.record()
        act()
        ended.record()
        ended.synchronize()
        figures.append(begun.elapsed_time(ended) / 1e3)
    return statistics.median(figures)
