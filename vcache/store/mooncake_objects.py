"""Objects in Mooncake: batched reads and writes straight from and into staging memory, owner by owner.

Runs in the Mooncake process. Why owner by owner: a batch that touches one hung owner takes 13 s for 32 objects (61 s if the
owner was never spoken to), and when it ends the leases on everybody else's objects have run out too: the whole batch is
lost. So each owner's part of a batch is transferred by itself; a part not done by the deadline is answered as pending, and
an owner with such a part gets no further ones until that has ended and a while has passed.

A part that is read is a few transfers, one after the other: what one brought is verified, and copied to where it is wanted,
while the next is under way.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING, Final

from vcache.companion.link import PENDING, TAINTED, Answer, Part
from vcache.errors import CorruptionError
from vcache.keys import ChunkKey
from vcache.store.base import Got, Put, Shard
from vcache.store.mooncake_wire import MAY_BE_THERE, Exist, Get, Object, PutAll, Remove, Setup
from vcache.store.objects import PAGE_BYTES, sealed, verify

if TYPE_CHECKING:
    from mooncake.store import MooncakeDistributedStore, ReplicateConfig

#: Parts of batches under way at once, hung ones included.
THREADS: Final = 16
#: A thread that waits for a transfer spins (0.3.13): those that move and verify bytes go first.
NICENESS: Final = 10
#: Objects that have come are verified by so many threads.
VERIFIERS: Final = 2
#: A part's transfers: each half of what is left, so that little is still to be verified when the last one ends, between these bounds.
MIN_TRANSFER_BYTES: Final = 16 << 20
MAX_TRANSFER_BYTES: Final = 32 << 20
#: How long an owner whose transfer hung is left alone after it ended.
AVOID_S: Final = 5.0


class Code(IntEnum):
    """Mooncake's answers that mean something of their own to us."""

    FULL = -200
    BAD_ARGUMENT = -600
    NOT_FOUND = -704
    LEASED = -706
    LEASE_EXPIRED = -707
    TRANSFER_FAILED = -800
    RPC_FAILED = -900
    RPC_TIMEOUT = -901


_REMOVED: Final[dict[int, int]] = {0: 1, Code.NOT_FOUND: 0}
_MASTER_GONE: Final = frozenset({Code.RPC_FAILED, Code.RPC_TIMEOUT})
_NO_TRANSFER: Final = _MASTER_GONE | {Code.BAD_ARGUMENT, Code.LEASED}  # refused before any byte moved


#: Indices of objects that are loaded; none: a part has ended.
Done = queue.SimpleQueue[list[int]]


class StagingMap:
    """Staging memory as this process sees it."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self._map = mmap.mmap(fd, nbytes)
        self._view = memoryview(self._map)
        self.address: Final = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def page(self, thing: Object) -> memoryview:
        return self._view[thing.offset : thing.offset + PAGE_BYTES]

    def payload(self, thing: Object) -> memoryview:
        return self._view[thing.offset + PAGE_BYTES : thing.offset + PAGE_BYTES + thing.nbytes]


class Objects:
    """Answers what is asked on the lanes. Thread-safe."""

    def __init__(self, handle: MooncakeDistributedStore, staging: StagingMap, setup: Setup) -> None:
        self._handle = handle
        self._staging = staging
        self._prefix = setup.key_prefix
        self._replicate = _replicate(setup)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="owner", initializer=_step_back)
        self._verifiers = ThreadPoolExecutor(VERIFIERS, thread_name_prefix="verify")
        self._owners = Owners()

    def exist(self, ask: Exist) -> Answer:
        codes = self._handle.batch_is_exist(ask.names)
        return Answer(codes) if all(code >= 0 for code in codes) else _unavailable(codes)

    def remove(self, ask: Remove) -> Answer:
        codes = self._handle.batch_remove(ask.names, True)  # a reader whose object goes while it reads finds out
        if any(code in _MASTER_GONE for code in codes):
            return _unavailable(codes)
        return Answer([_REMOVED.get(code, MAY_BE_THERE) for code in codes])

    def get(self, ask: Get) -> Iterator[Answer | Part]:
        """One answer within the deadline, after parts of it, and another one if that left anything pending."""
        deadline = time.monotonic() + ask.timeout_s
        names = [self._name(thing) for thing in ask.objects]
        found = self._handle.batch_get_replica_desc(names)
        if not found:  # nothing there, or nobody to ask: only the codes of another call tell
            answer = self.exist(Exist(names[:1]))
            yield answer if answer.error else Answer([Got.ABSENT] * len(names))
            return
        codes = [PENDING] * len(names)
        parts: defaultdict[str, list[int]] = defaultdict(list)
        for index, (name, thing) in enumerate(zip(names, ask.objects, strict=True)):
            owner, nbytes = _first_replica(found.get(name, ()))
            if nbytes is None:
                codes[index] = Got.ABSENT
            elif nbytes != PAGE_BYTES + thing.nbytes:
                codes[index] = Got.INVALID
                self._handle.batch_remove([name], True)
            elif self._owners.avoided(owner):
                codes[index] = Got.FAILED
            else:
                parts[owner].append(index)
        done: Done = queue.SimpleQueue()
        work = partial(self._read, names, ask.objects, codes, done, deadline)
        yield from self._in_parts(parts, work, codes, done, deadline)

    def put(self, ask: PutAll) -> Iterator[Answer | Part]:
        """As ``get``. Mooncake chooses the owners itself, so a hung one is met by chance and takes the batch with it."""
        deadline = time.monotonic() + ask.timeout_s
        names = [self._name(thing) for thing in ask.objects]
        present = self._handle.batch_is_exist(names)
        if any(code < 0 for code in present):
            yield _unavailable(present)
            return
        codes = [
            Put.EXISTS if there else PENDING for there in present
        ]  # Mooncake would keep the old bytes and say "ok"
        missing = [index for index, there in enumerate(present) if not there]
        work = partial(self._write, names, ask.objects, codes)
        yield from self._in_parts({"": missing} if missing else {}, work, codes, queue.SimpleQueue(), deadline)

    def _in_parts(
        self,
        parts: Mapping[str, list[int]],
        work: Callable[[Sequence[int]], None],
        codes: list[int],
        done: Done,
        deadline: float,
    ) -> Iterator[Answer | Part]:
        """Works on each owner's part in a thread of its own. One transfer a part at a time: two at once were no faster."""
        running = {self._threads.submit(work, part): owner for owner, part in parts.items()}
        for future in running:
            future.add_done_callback(lambda _: done.put([]))
        left = len(running)
        while left:
            try:
                indices = done.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            left -= not indices
            if indices:
                yield Part(indices)
        late = [future for future in running if not future.done()]
        if late:
            for future in late:
                self._owners.hung(running[future])
            yield Answer([PENDING if code == TAINTED else code for code in codes], last=False)
            for future in late:
                wait([future])
                self._owners.came_back(running[future])
        yield Answer(codes)

    def _read(
        self,
        names: Sequence[str],
        things: Sequence[Object],
        codes: list[int],
        done: Done,
        deadline: float,
        part: Sequence[int],
    ) -> None:
        verifications: list[Future[None]] = []
        left = list(part)
        while left:
            count = _next_transfer([things[index].nbytes for index in left])
            asked, left = left[:count], left[count:]
            moved = self._handle.batch_get_into(
                [names[index] for index in asked],
                [self._staging.address + things[index].offset for index in asked],
                [PAGE_BYTES + things[index].nbytes for index in asked],
            )
            if time.monotonic() > deadline or all(_is_lost(code) for code in moved):
                for index in left:  # their memory was not touched
                    codes[index] = Got.FAILED
                left = []
            tell = done if left else None  # the answer follows at once
            verify_all = partial(self._verify_all, names, things, codes, tell, asked, moved)
            verifications.append(self._verifiers.submit(verify_all))
        for verification in verifications:
            verification.result()

    def _verify_all(
        self,
        names: Sequence[str],
        things: Sequence[Object],
        codes: list[int],
        done: Done | None,
        asked: Sequence[int],
        moved: Sequence[int],
    ) -> None:
        for index, code in zip(asked, moved, strict=True):
            codes[index] = self._verified(names[index], things[index], code)
        loaded = [index for index in asked if codes[index] == Got.LOADED]
        if done is not None and loaded:
            done.put(loaded)

    def _verified(self, name: str, thing: Object, code: int) -> int:
        if code == Code.NOT_FOUND:
            return Got.ABSENT
        if code == Code.LEASE_EXPIRED:
            return Got.INTERRUPTED
        if code in _NO_TRANSFER:
            return Got.FAILED
        if code != PAGE_BYTES + thing.nbytes:
            return TAINTED
        try:
            verify(_shard(thing), self._staging.page(thing), self._staging.payload(thing))
        except CorruptionError:
            self._handle.batch_remove([name], True)
            return Got.INVALID
        return Got.LOADED

    def _write(self, names: Sequence[str], things: Sequence[Object], codes: list[int], part: Sequence[int]) -> None:
        for thing in (things[index] for index in part):
            self._staging.page(thing)[:] = sealed(_shard(thing), self._staging.payload(thing))
        stored = self._handle.batch_put_from(
            [names[index] for index in part],
            [self._staging.address + things[index].offset for index in part],
            [PAGE_BYTES + things[index].nbytes for index in part],
            self._replicate,
        )
        for index, code in zip(part, stored, strict=True):
            codes[index] = Put.STORED if code == 0 else Put.FULL if code == Code.FULL else Put.FAILED

    def _name(self, thing: Object) -> str:
        return object_name(self._prefix, _shard(thing))


class Owners:
    """Which owners of objects hang, or did a moment ago. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hanging: defaultdict[str, int] = defaultdict(int)  # parts now overdue
        self._avoid_until: dict[str, float] = {}

    def avoided(self, owner: str) -> bool:
        with self._lock:
            return self._hanging[owner] > 0 or time.monotonic() < self._avoid_until.get(owner, 0.0)

    def hung(self, owner: str) -> None:
        with self._lock:
            self._hanging[owner] += 1

    def came_back(self, owner: str) -> None:
        with self._lock:
            self._hanging[owner] -= 1
            self._avoid_until[owner] = time.monotonic() + AVOID_S


def object_name(prefix: str, shard: Shard) -> str:
    """The name of a shard's object in Mooncake."""
    return f"{prefix}/{shard.key.hex()}-{shard.rank}"


def _step_back() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _next_transfer(sizes: Sequence[int]) -> int:
    """How many of the objects with these sizes to transfer at once."""
    room = min(max(sum(sizes) // 2, MIN_TRANSFER_BYTES), MAX_TRANSFER_BYTES)
    count = 0
    while count < len(sizes) and (room > 0 or not count):
        room -= sizes[count]
        count += 1
    return count


def _is_lost(code: int) -> bool:
    """Whether an object did not come for a reason that others of its owner share."""
    return code < 0 and code not in (Code.NOT_FOUND, Code.LEASE_EXPIRED)


def _shard(thing: Object) -> Shard:
    return Shard(ChunkKey(thing.key), thing.rank, thing.ranks, thing.layout)


def _first_replica(replicas: Sequence[object]) -> tuple[str, int | None]:
    """Who would deliver an object, and its size; no size: it is not there."""
    for replica in replicas:
        if replica.is_memory_replica():  # type: ignore[attr-defined]
            buffer = replica.get_memory_descriptor().buffer_descriptor  # type: ignore[attr-defined]
            return buffer.transport_endpoint, buffer.size
    return "", None


def _replicate(setup: Setup) -> ReplicateConfig:
    from mooncake.store import ReplicateConfig, SoftPinAction

    config = ReplicateConfig()
    config.replica_num = setup.replicas
    if setup.soft_pin_s:
        config.soft_pin_action = SoftPinAction.ENABLE
        config.soft_pin_ttl_ms = int(setup.soft_pin_s * 1000)
    return config


def _unavailable(codes: Sequence[int]) -> Answer:
    return Answer([], f"the Mooncake master does not answer (code {min(codes, default=0)})")
