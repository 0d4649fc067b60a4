"""Opaque objects in the pool, by key: what both LMCache modes are made of.

Every call is at most one round trip per run of keys, never raises because something is unavailable, and copies on the caller's thread.
Not here: LMCache's interfaces, threads, which form an object has.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch

from vcache.devices import checked_device, device_name
from vcache.errors import UnavailableError
from vcache.failures import FailureLog
from vcache.keys import ChunkKey, parts_of
from vcache.log import configure
from vcache.memory.allocation import allocate
from vcache.pool.client import PoolClient
from vcache.pool.donor import Donor
from vcache.pool.locating import locate
from vcache.pool.own_records import OwnRecord, OwnRecords
from vcache.pool.reading import Int64Array, Source, begin_read
from vcache.pool.segment import Segment
from vcache.pool.writing import begin_write
from vcache.protocol import MAX_KEYS_PER_CALL, Outcome, ServerStats
from vcache_lmcache.options import LMCacheOptions

logger: Final = logging.getLogger(__name__)

#: Where the payload of the index-th key is to go, given its size and layout word; ``None``: it is of no use there.
TargetOf = Callable[[int, int, int], torch.Tensor | None]
#: Takes over the hold on a payload of this process's own segment, valid for as long as it has it; false: it is of no use.
InPlace = Callable[["Held"], bool]
#: A batch of reads goes on behind so many keys that were not there; it was looked up before, so one is rare.
_MAX_GAPS: Final = 16


class Held(NamedTuple):
    """A payload that is read where it lies: of the key at ``at``, in this process's own segment, its record held."""

    at: int
    record: int
    offset: int
    nbytes: int
    layout: int


@dataclass(frozen=True)
class NewObject:
    """What is to be stored. ``data``: uint8 ``[nbytes]``, unchanged until it is."""

    key: ChunkKey
    data: torch.Tensor
    layout: int
    tokens: int
    tenant: int

    @property
    def run(self) -> object:
        """Objects that one call can reserve space for have this in common."""
        return self.data.numel(), self.layout, self.tokens, self.tenant


class ObjectPool:
    """A client of the pool, and the segment that this process may donate. Thread-safe.

    Construction waits at most ``client.connect_timeout`` for the server. Raises ``ConfigError`` for a device that is none,
    ``CapacityError`` when there is not as much memory as ``donate`` asks for.
    """

    def __init__(self, options: LMCacheOptions, *, role: str) -> None:
        self.options = options
        self.config = options.config
        configure(self.config.log_level, role)
        self.failures = FailureLog(logger)
        device = checked_device(options.device)
        self.client = PoolClient(self.config, device=device_name(device), writes=True, name=f"{role} pid {os.getpid()}")
        #: Of what this process donates, and what it has seen there.
        self.donor: Donor | None = None
        self.own_records: OwnRecords | None = None
        try:
            if options.donate_bytes:
                self.donor = self._donate(device, role)
                self.own_records = OwnRecords(self.donor)
        except BaseException:
            self.client.close()
            raise
        timeout_s = self.config.client.connect_timeout
        if not self.client.wait_available(timeout_s):
            logger.warning("no metadata server at %s yet; until there is one, nothing is found", self.config.endpoint)
        elif self.donor is not None:
            self.donor.wait_registered(timeout_s)

    @property
    def lock_s(self) -> float:
        """How long a lease lasts that waits for LMCache to end it."""
        return self.config.server.max_lease

    def is_known_absent(self, key: ChunkKey) -> bool:
        """Whether the pool has it not, as far as that can be said without a round trip."""
        with self.failures.contained("lookup"):
            return self.client.peek(key) == 0
        return False

    def lookup(self, keys: Sequence[ChunkKey], *, leased: bool, waits: bool = True) -> tuple[int, int]:
        """The length of the leading run that is there, and the lease on it (0: none was asked for or given).

        ``waits``: for the lease, too; otherwise what is evicted before the server reads of it is a miss when it is loaded.
        """
        hits = lease = 0
        with self.failures.contained("lookup"):
            for part in parts_of(keys):
                found = self.client.lookup(b"".join(part), self.lock_s if leased and not hits else 0.0, waits=waits)
                hits += found.hits
                lease = lease or found.lease
                if found.hits < len(part):
                    break
        return hits, lease

    def locate(self, keys: Sequence[ChunkKey]) -> tuple[list[bool], list[tuple[Sequence[ChunkKey], int]]]:
        """Which of them are there; and those, with the leases on them (0: none was given)."""
        present: list[bool] = []
        leased: list[tuple[Sequence[ChunkKey], int]] = []
        with self.failures.contained("locate"):
            for part in parts_of(keys):
                found = locate(self.client, b"".join(part), self.lock_s)
                if found is None:
                    break
                present += map(bool, found.present)
                leased.append(
                    ([key for key, is_there in zip(part, found.present, strict=True) if is_there], found.lease)
                )
        return present + [False] * (len(keys) - len(present)), leased

    def load(
        self,
        keys: Sequence[ChunkKey],
        layouts: Sequence[int],
        target_of: TargetOf,
        in_place: InPlace | None = None,
    ) -> list[bool]:
        """Copies the payloads that are there; which of them were. Only where true may a target be used.

        ``layouts``: the layout word that each is expected to have. Of what lies on another host, no other is read. With
        ``in_place``, what lies in this process's own segment is not copied: once valid it is given to that, with its hold.
        """
        if in_place is not None and self.own_records is not None:
            seen = self.own_records.hold(keys)
            if seen is not None:
                return self._read_in_place(keys, seen, in_place)
        loaded = [False] * len(keys)
        at = gaps = 0
        while at < len(keys) and gaps <= _MAX_GAPS and self.client.available:
            end = _end_of_run(layouts, at)
            at += self._load_run(keys[at:end], at, layouts[at], target_of, in_place, loaded)
            if at < end:  # what ended the run is not there
                at += 1
                gaps += 1
        return loaded

    def store(self, objects: Sequence[NewObject], *, chained: bool) -> list[Outcome]:
        """Stores what the pool has not; ``GRANTED`` for what this call stored, ``DECLINED`` where it could not.

        ``chained``: they are consecutive chunks of a prompt, of which the last are evicted first.
        """
        outcomes: list[Outcome] = []
        for run in _runs(objects):
            outcomes += self._store_run(run, chained=chained)
        return outcomes

    def release(self, lease: int) -> None:
        """Ends a lease. Does not wait."""
        self.client.release(lease)

    def pin(self, keys: Sequence[ChunkKey], pin_s: float) -> int:
        """Keeps chunks from eviction; how many were there."""
        with self.failures.contained("pin"):
            return sum(self.client.pin(b"".join(part), pin_s) for part in parts_of(keys))
        return 0

    def unpin(self, keys: Sequence[ChunkKey]) -> int:
        """Ends pins; how many there were."""
        with self.failures.contained("unpin"):
            return sum(self.client.unpin(b"".join(part)) for part in parts_of(keys))
        return 0

    def remove(self, keys: Sequence[ChunkKey]) -> int | None:
        """Removes objects; how many. They are gone from memory when it returns; ``None`` when that could not be had in time."""
        with self.failures.contained("remove"):
            removed = [self.client.remove(b"".join(part)) for part in parts_of(keys)]
            return self._confirmed("remove", None if None in removed else sum(count or 0 for count in removed))
        return None

    def clear(self, tenant: int) -> int | None:
        """Removes everything of a tenant; how many, as ``remove`` says it."""
        with self.failures.contained("clear"):
            return self._confirmed("clear", self.client.clear(tenant))
        return None

    def stats(self) -> ServerStats | None:
        """The server's state; ``None`` when it does not answer."""
        with self.failures.contained("stats"):
            return self.client.stats()
        return None

    def close(self) -> None:
        """Takes back what was donated and leaves the pool. No call may be under way. Harmless when called twice."""
        if self.donor is not None:
            self.donor.close()
        self.client.close()

    def _confirmed(self, operation: str, removed: int | None) -> int | None:
        """Counts and says a removal that was not confirmed: to LMCache it looks like one that found nothing."""
        if removed is None:
            self.failures.record(operation, UnavailableError("not confirmed by all; some objects may still be there"))
        return removed

    def _donate(self, device: torch.device, role: str) -> Donor:
        segment_id = secrets.token_bytes(16)
        memory = allocate(self.config, self.client.runtime, segment_id, self.options.donate_bytes, device=str(device))
        try:
            return Donor(self.config, self.client, memory, segment_id, label=role)
        except BaseException:
            memory.close()
            raise

    def _read_in_place(self, keys: Sequence[ChunkKey], seen: Sequence[OwnRecord], in_place: InPlace) -> list[bool]:
        """Gives away what is held. The server is told of the use, not asked."""
        assert self.donor is not None
        loaded = []
        for at, one in enumerate(seen):
            loaded.append(in_place(Held(at, one.record, one.offset, one.nbytes, one.layout)))
            if not loaded[-1]:
                self.donor.holds.release(one.record)
        for part in parts_of(keys):
            self.client.touch(b"".join(part))
        return loaded

    def _load_run(
        self,
        part: Sequence[ChunkKey],
        at: int,
        layout: int,
        target_of: TargetOf,
        in_place: InPlace | None,
        loaded: list[bool],
    ) -> int:
        """Reads the leading run of ``part``, which is at ``at`` in the batch, noting in ``loaded`` what is valid; its length."""
        valid = 0
        fits = [False] * len(part)
        held: list[Held] = []
        donor = self.donor if in_place is not None else None
        with self.failures.contained("load"):
            read = begin_read(self.client, part, 0)
            sizes = read.placements["nbytes"].tolist()
            records = read.placements["record"].astype("int64")

            def copy_out(source: Source, chunks: Int64Array, offsets: Int64Array) -> None:
                layouts = [layout] * len(chunks)
                if isinstance(source, Segment):
                    layouts = source.layouts(records[chunks]).tolist()
                if donor is not None and source is donor.segment:
                    taken = [donor.holds.take(record) for record in records[chunks].tolist()]  # before it is validated
                    rows = zip(taken, chunks.tolist(), offsets.tolist(), layouts, strict=True)
                    held.extend(Held(c, int(records[c]), o, sizes[c], said) for is_held, c, o, said in rows if is_held)
                    return
                for chunk, offset, said in zip(chunks.tolist(), offsets.tolist(), layouts, strict=True):
                    target = target_of(at + chunk, sizes[chunk], said)
                    if target is not None:
                        target.copy_(source.tensor[offset : offset + sizes[chunk]])
                        fits[chunk] = True

            try:
                with torch.inference_mode():  # whoever maps a segment first, in that mode or not, it may be copied
                    read.copy_with(copy_out, layout=layout)
            finally:
                try:
                    valid = read.complete()
                finally:
                    for each in held:
                        assert donor is not None and in_place is not None
                        fits[each.at] = each.at < valid and in_place(each._replace(at=at + each.at))
                        if not fits[each.at]:
                            donor.holds.release(each.record)
                    if held and self.own_records is not None:
                        generations = read.placements["generation"].tolist()
                        self.own_records.saw(
                            (part[h.at], OwnRecord(h.record, generations[h.at], h.offset, h.nbytes, h.layout))
                            for h in held
                            if fits[h.at]
                        )
        loaded[at : at + valid] = fits[:valid]
        return valid

    def _store_run(self, run: Sequence[NewObject], *, chained: bool) -> list[Outcome]:
        outcomes = [Outcome.DECLINED] * len(run)
        with self.failures.contained("store"):
            first = run[0]
            write = begin_write(
                self.client,
                [new.key for new in run],
                parent=b"",
                rank=0,
                ranks=1,
                nbytes=first.data.numel(),
                tokens=first.tokens,
                tenant=first.tenant,
                layout=first.layout,
                chained=chained,
            )
            granted = write.granted.tolist()

            def copy_in(segment: Segment, chunks: Int64Array, offsets: Int64Array) -> None:
                for chunk, offset in zip(chunks.tolist(), offsets.tolist(), strict=True):
                    segment.tensor[offset : offset + write.nbytes].copy_(run[granted[chunk]].data)

            try:
                with torch.inference_mode():
                    write.copy_with(copy_in)
            finally:
                write.complete()
            if write.outcomes:
                outcomes = write.outcomes
        return outcomes


def _end_of_run(layouts: Sequence[int], at: int) -> int:
    """Where those that one call can read end."""
    end = at + 1
    while end < len(layouts) and end - at < MAX_KEYS_PER_CALL and layouts[end] == layouts[at]:
        end += 1
    return end


def _runs(objects: Sequence[NewObject]) -> Iterator[Sequence[NewObject]]:
    """Neighbours that one call can reserve space for."""
    start = 0
    for at in range(1, len(objects) + 1):
        if at == len(objects) or at - start == MAX_KEYS_PER_CALL or objects[at].run != objects[start].run:
            yield objects[start:at]
            start = at
