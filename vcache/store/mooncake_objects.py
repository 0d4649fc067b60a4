"""Objects in Mooncake: batched reads and writes straight from and into staging memory, owner by owner.

Runs in the Mooncake process. Why owner by owner: a batch that touches one hung owner takes 13 s for 32 objects (61 s if the
owner was never spoken to), and when it ends the leases on everybody else's objects have run out too: the whole batch is
lost. So each owner's part of a batch is transferred by itself; a part not done by the deadline is answered as pending, and
an owner with such a part gets no further ones until that has ended and a while has passed.

Reads ask the master where objects lie, which leases them, and then the transfer engine for each. ``batch_get_into`` does the
same, but spins on a core while it waits: on two cores it took 1.4 times as long. And it answers for all at once; here what has come is
verified, and copied to where it is wanted, while the rest is under way.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from vcache.companion.link import PENDING, TAINTED, Answer, Part
from vcache.errors import CorruptionError
from vcache.keys import ChunkKey
from vcache.store.base import Got, Put, Shard
from vcache.store.mooncake_wire import MAY_BE_THERE, Exist, Get, Object, PutAll, Remove, Setup
from vcache.store.objects import PAGE_BYTES, sealed, verify

if TYPE_CHECKING:
    from mooncake.engine import TransferEngine
    from mooncake.store import MooncakeDistributedStore, ReplicateConfig

#: Parts of batches under way at once, hung ones included.
THREADS: Final = 16
#: A thread that waits for a write spins (0.3.13): those that read go first.
NICENESS: Final = 5
#: Objects that have come are verified by so many threads, so many bytes at a time.
VERIFIERS: Final = 2
VERIFIED_BYTES: Final = 8 << 20
#: Between two looks at transfers under way: the first, which is doubled each time, and the longest.
FIRST_PAUSE_S: Final = 0.0001
PAUSE_S: Final = 0.001
#: A transfer that takes longer is given up, should the transport's own time-outs not end it.
LONGEST_S: Final = 30.0
#: What does not match its checksum so long after it was leased may have been overwritten meanwhile, and is not removed. Masters
#: lease for longer.
LEASE_S: Final = 1.0
#: How long an owner whose transfer hung is left alone after it ended.
AVOID_S: Final = 5.0


class Code(IntEnum):
    """Mooncake's answers that mean something of their own to us."""

    FULL = -200
    NOT_FOUND = -704
    RPC_FAILED = -900
    RPC_TIMEOUT = -901


_REMOVED: Final[dict[int, int]] = {0: 1, Code.NOT_FOUND: 0}
_MASTER_GONE: Final = frozenset({Code.RPC_FAILED, Code.RPC_TIMEOUT})
#: What ``transfer_check_status`` says.
_DONE, _UNDER_WAY = 1, 0

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


class _Place(NamedTuple):
    """Where an object lies."""

    owner: str
    address: int
    nbytes: int


@dataclass(frozen=True)
class _Reading:
    """A batch under way: its names, their codes so far, and where they lie."""

    names: Sequence[str]
    things: Sequence[Object]
    codes: list[int]
    places: Mapping[int, _Place]  # by index
    done: Done
    deadline: float
    leased_at: float


class Objects:
    """Answers what is asked on the lanes. Thread-safe."""

    def __init__(
        self, handle: MooncakeDistributedStore, engine: TransferEngine, staging: StagingMap, setup: Setup
    ) -> None:
        """``engine``: the one that ``handle`` uses."""
        self._handle = handle
        self._engine = engine
        self._staging = staging
        self._prefix = setup.key_prefix
        self._replicate = _replicate(setup)
        self._readers = ThreadPoolExecutor(THREADS, thread_name_prefix="owner")
        self._writers = ThreadPoolExecutor(THREADS, thread_name_prefix="write", initializer=_step_back)
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
        leased_at = time.monotonic()
        names = [self._name(thing) for thing in ask.objects]
        found = self._handle.batch_get_replica_desc(names)
        if not found:  # nothing there, or nobody to ask: only the codes of another call tell
            answer = self.exist(Exist(names[:1]))
            yield answer if answer.error else Answer([Got.ABSENT] * len(names))
            return
        codes = [PENDING] * len(names)
        places: dict[int, _Place] = {}
        parts: defaultdict[str, list[int]] = defaultdict(list)
        for index, (name, thing) in enumerate(zip(names, ask.objects, strict=True)):
            replicas = _replicas(found.get(name, ()))
            able = [each for each in replicas if not self._owners.avoided(each.owner)]
            place = min(able, key=lambda each: self._owners.has_failed(each.owner), default=None)
            if not replicas:
                codes[index] = Got.ABSENT
            elif replicas[0].nbytes != PAGE_BYTES + thing.nbytes:
                codes[index] = Got.INVALID
                self._handle.batch_remove([name], True)
            elif place is None:
                codes[index] = Got.FAILED
            else:
                places[index] = place
                parts[place.owner].append(index)
        done: Done = queue.SimpleQueue()
        deadline = leased_at + ask.timeout_s
        reading = _Reading(names, ask.objects, codes, places, done, deadline, leased_at)
        running = {self._readers.submit(self._read, reading, owner, part): owner for owner, part in parts.items()}
        yield from self._answers(running, codes, done, deadline)

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
        running = {self._writers.submit(self._write, names, ask.objects, codes, missing): ""} if missing else {}
        yield from self._answers(running, codes, queue.SimpleQueue(), deadline)

    def _answers(
        self, running: Mapping[Future[None], str], codes: list[int], done: Done, deadline: float
    ) -> Iterator[Answer | Part]:
        """What becomes of each owner's part."""
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

    def _read(self, reading: _Reading, owner: str, part: Sequence[int]) -> None:
        """One transfer for each object, all at once."""
        if not self._is_met(owner) or time.monotonic() > reading.deadline:
            for index in part:  # their memory was not touched
                reading.codes[index] = Got.FAILED
            return
        under_way: dict[int, int] = {}  # transfers by index
        for index in part:
            thing, place = reading.things[index], reading.places[index]
            target = self._staging.address + thing.offset
            transfer = self._engine.batch_transfer_async_read(owner, [target], [place.address], [place.nbytes])
            if transfer:
                under_way[index] = transfer
            else:
                reading.codes[index] = Got.FAILED
                self._owners.failed(owner)
        verifications = [self._verifiers.submit(self._verify, reading, come) for come in self._come(reading, under_way)]
        for verification in verifications:
            verification.result()

    def _come(self, reading: _Reading, under_way: dict[int, int]) -> Iterator[list[int]]:
        """Waits for transfers; indices of those that are done, ``VERIFIED_BYTES`` or so at a time."""
        come: list[int] = []
        given_up_at = time.monotonic() + LONGEST_S
        pause_s = FIRST_PAUSE_S
        while under_way and time.monotonic() < given_up_at:
            for index, transfer in list(under_way.items()):
                state = self._engine.transfer_check_status(transfer)
                if state != _UNDER_WAY:
                    del under_way[index]
                    if state == _DONE:
                        come.append(index)
                    else:
                        reading.codes[index] = TAINTED
                        self._owners.failed(reading.places[index].owner)
            if come and (not under_way or sum(reading.things[index].nbytes for index in come) >= VERIFIED_BYTES):
                yield come
                come = []
            if under_way:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, PAUSE_S)
        for index in under_way:
            reading.codes[index] = TAINTED
        if come:
            yield come

    def _verify(self, reading: _Reading, come: Sequence[int]) -> None:
        for index in come:
            reading.codes[index] = self._verified(reading, index)
        loaded = [index for index in come if reading.codes[index] == Got.LOADED]
        if loaded:
            reading.done.put(loaded)

    def _verified(self, reading: _Reading, index: int) -> Got:
        thing = reading.things[index]
        leased_s = time.monotonic() - reading.leased_at  # at least so long ago
        try:
            verify(_shard(thing), self._staging.page(thing), self._staging.payload(thing))
        except CorruptionError:
            if leased_s > LEASE_S:
                return Got.INTERRUPTED
            self._handle.batch_remove([reading.names[index]], True)
            return Got.INVALID
        return Got.LOADED

    def _is_met(self, owner: str) -> bool:
        """Whether an owner answers; asked once. The engine's first read from one that hangs would stop all others for a minute."""
        if not self._owners.is_met(owner):
            if self._engine.send_probe(owner):
                self._owners.failed(owner)
                return False
            self._owners.meet(owner)
        return True

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
        self._failed_until: dict[str, float] = {}
        self._met: set[str] = set()

    def avoided(self, owner: str) -> bool:
        with self._lock:
            return self._hanging[owner] > 0 or time.monotonic() < self._avoid_until.get(owner, 0.0)

    def is_met(self, owner: str) -> bool:
        """Whether it has answered once."""
        return owner in self._met

    def meet(self, owner: str) -> None:
        self._met.add(owner)

    def has_failed(self, owner: str) -> bool:
        """Whether it failed to deliver a moment ago: somebody else is asked, if there is one."""
        return time.monotonic() < self._failed_until.get(owner, 0.0)

    def failed(self, owner: str) -> None:
        self._failed_until[owner] = time.monotonic() + AVOID_S

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


def _shard(thing: Object) -> Shard:
    return Shard(ChunkKey(thing.key), thing.rank, thing.ranks, thing.layout)


def _replicas(replicas: Sequence[object]) -> list[_Place]:
    """Who would deliver an object; nobody: it is not there."""
    found = []
    for replica in replicas:
        if replica.is_memory_replica():  # type: ignore[attr-defined]
            buffer = replica.get_memory_descriptor().buffer_descriptor  # type: ignore[attr-defined]
            found.append(_Place(buffer.transport_endpoint, buffer.buffer_address, buffer.size))
    return found


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
