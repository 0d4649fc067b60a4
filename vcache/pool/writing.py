"""The write path: reserve, mark the records, copy the payloads, commit the records, tell the server. In this order.

Each step is a method of its own, so that tests can stop a writer between any two. Whatever happens, a writer touches only the
records and extents it was granted, and gives them back only once it touches them no more.

Copies of a GPU's planes are only enqueued. What a kernel copies within VRAM is marked and committed by kernels too, in the order of the
copy's stream (``enqueued_records.py``); host memory is committed once the stream has come past the copy. Until ``complete``
nobody waits for the device, nor does CUDA: into host memory that is not pinned for it nothing is copied.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vcache.keys import ChunkKey
from vcache.log import KeyText
from vcache.memory.base import WordArray
from vcache.pool.client import PLACEMENT_DTYPE, Granted, PlacementArray, PoolClient
from vcache.pool.mappings import Use
from vcache.pool.parts import Part, parted
from vcache.pool.records import RunFields, key_words, pack
from vcache.pool.segment import Segment
from vcache.protocol import KEY_BYTES, Outcome, Tier

if TYPE_CHECKING:
    import torch

    from vcache.paged_kv import PagedKV
    from vcache.pool.enqueued_records import EnqueuedWrite
    from vcache.transfer.events import Event

logger = logging.getLogger(__name__)

Int64Array = npt.NDArray[np.int64]
#: Copies the chunks with these indices in ``granted`` to the payloads at ``offsets`` of a segment.
CopyIn = Callable[[Segment, Int64Array, Int64Array], None]


def begin_write(
    client: PoolClient,
    keys: Sequence[ChunkKey],
    *,
    parent: bytes,
    rank: int,
    ranks: int,
    nbytes: int,
    tokens: int,
    tenant: int,
    ttl_s: int = 0,
    pin_s: float = 0.0,
    layout: int = 0,
    into: int = 0,
    into_tier: Tier | None = None,
    chained: bool = True,
    device: torch.device | None = None,
) -> PendingWrite:
    """Reserves space for those of ``keys`` that the pool has not, and marks their records. One round trip.

    ``into`` (a segment's number), ``into_tier``: reserves for copies of those that the pool has, but not there; see
    ``protocol.Reserve``. Check the source's records after the copy, and ``drop`` what was not valid, before ``complete``.

    ``parent``: the key before the first (empty: none), or before each if they are not ``chained``; ``nbytes``: of each payload; ``tokens``: of each chunk; ``layout``:
    ``PagedKV.payload_layout`` of the planes, without which ``PendingRead.copy_to`` takes no payload; ``device``: of these planes, if
    ``copy_from`` will copy them. Never raises because something is unavailable: nothing is granted then. The answer must be
    completed or aborted.
    """
    run = RunFields(tenant, rank, ranks, tokens, ttl_s, layout=layout)
    write = PendingWrite(client, keys, parent, run, nbytes, chained=chained, device=device)
    if keys:
        try:
            write.reserve(pin_s, into=into, into_tier=into_tier)
            write.mark()
        except BaseException:
            write.abort()
            raise
    return write


class PendingWrite:
    """Granted chunks, on their way into the pool. Copy them, then ``complete``. Not thread-safe.

    ``outcomes``: an ``Outcome`` per key (empty: the server is unavailable); ``granted``: int64 indices of the keys that are
    being written.
    """

    def __init__(
        self,
        client: PoolClient,
        keys: Sequence[ChunkKey],
        parent: bytes,
        run: RunFields,
        nbytes: int,
        *,
        chained: bool = True,
        device: torch.device | None = None,
    ) -> None:
        self.outcomes: list[Outcome] = []
        self.granted: Int64Array = np.empty(0, dtype=np.int64)
        self.placements: PlacementArray = np.empty(0, dtype=PLACEMENT_DTYPE)
        self.nbytes = nbytes
        self.layout = run.layout
        self._client = client
        self._keys = keys
        self._parent = parent
        self._chained = chained
        self._run = run
        self._device = device
        self._uses: dict[int, Use] = {}
        self._parts: list[Part] = []
        #: By number, the segments whose records kernels mark and commit; None: not yet.
        self._enqueued: dict[int, EnqueuedWrite | None] = {}
        self._copied = False
        #: Behind the copies that no kernel commits; None: there are none.
        self._copies: Event | None = None
        self._committed: list[int] = []
        self._stored: int | None = None

    @property
    def segments(self) -> list[Segment]:
        """Those that are written to. Mapped until ``complete`` or ``abort``."""
        return [use.segment for use in self._uses.values()]

    # --- the steps ------------------------------------------------------------------------------------------------

    def reserve(self, pin_s: float, *, into: int = 0, into_tier: Tier | None = None) -> None:
        """Asks the server for space. What it grants in segments that cannot be mapped here is given back at once."""
        run = self._run
        granted = self._client.reserve(
            b"".join(self._keys),
            parent=self._parent,
            rank=run.rank,
            ranks=run.ranks,
            nbytes=self.nbytes,
            tokens=run.tokens,
            tenant=run.tenant,
            ttl_s=run.ttl_s,
            pin_s=pin_s,
            into=into,
            into_tier=into_tier,
            chained=self._chained,
        )
        if granted is not None:
            self._map(granted)

    def mark(self) -> None:
        """Says in memory that a writer is at each record; gives back those that are not free.

        Where a kernel is to copy, ``copy_from`` does that, and ``complete`` gives back.
        """
        device = self._device
        if device is not None:
            self._enqueued = {part.number: None for part in self._parts if part.segment.is_copied_by_kernels(device)}
        rows = self._rows()
        refused: list[int] = []
        for part in self._parts:
            if part.number not in self._enqueued:
                marked = part.segment.mark(part.records.tolist(), rows[part.chunks])
                if not part.segment.is_on_host:  # whoever copies may do so on another stream
                    part.segment.fence()
                if not all(marked):
                    refused += part.chunks[~np.array(marked)].tolist()
        self._give_back(refused_marks=refused)

    def copy_from(self, kv: PagedKV, block_ids: Int64Array) -> None:
        """Copies blocks ``[len(granted), blocks per chunk]`` into the payloads; of planes on a GPU, enqueues it on the current stream.

        Raises ``ValueError`` for bad block ids, or blocks of another size than was reserved; nothing is written then.
        """
        from vcache.transfer import gather, recorded  # loads torch

        payload_bytes = kv.payload_bytes(block_ids.shape[1])
        if payload_bytes != self.nbytes:
            raise ValueError(f"block_ids: chunks of {payload_bytes} bytes, {self.nbytes} were reserved for each")
        if kv.payload_layout != self._run.layout:
            raise ValueError("kv: its payload_layout is not the layout that the records were marked with")
        if self._enqueued and kv.device != self._device:
            raise ValueError(f"kv: on {kv.device}, the write was begun for planes on {self._device}")
        threads = self._client.config.transfer.threads
        try:
            for part in self._parts:
                blocks = block_ids[part.chunks]
                if part.number in self._enqueued:
                    self._enqueue(part, kv, blocks)
                else:
                    gather(kv, blocks, part.segment.tensor, part.offsets, threads=threads)
        finally:
            if kv.device.type == "cuda":
                self._copies = recorded(kv.device)
        self._copied = True

    def copy_with(self, copy_in: CopyIn) -> None:
        """Copies by a function of the caller, called once per segment. Not for a write that was begun for planes on a GPU."""
        if self._enqueued:
            raise ValueError("copy_with: of a write that was begun with device, copy_from copies")
        for part in self._parts:
            copy_in(part.segment, part.chunks, part.offsets)
        self._copied = True

    def drop(self, which: npt.NDArray[np.bool_]) -> None:
        """Gives back those of ``granted`` (a mask over it) whose source was no longer theirs after the copy.

        No copy into them may be running any more. They leave ``granted`` and ``placements``.
        """
        self._give_back(lost_sources=np.flatnonzero(which).tolist())

    def commit_records(self) -> None:
        """Makes each payload valid, in memory."""
        for write in self._enqueued.values():
            if write is not None:
                write.commit()
        self._await_copies()
        refused: list[int] = []
        lost: list[int] = []
        for part in self._parts:
            write = self._enqueued.get(part.number)
            if write is None:
                part.segment.fence()
                committed = part.segment.commit(part.records.tolist(), part.generations.tolist())
            else:
                is_refused, is_ours = write.outcome()
                refused += part.chunks[is_refused].tolist()
                committed = is_ours.tolist()
            if all(committed):
                self._committed += part.generations.tolist()
            else:
                is_committed = np.array(committed)
                self._committed += part.generations[is_committed].tolist()
                lost += part.chunks[~is_committed].tolist()
        self._client.session.committed(self._committed)
        self._give_back(refused_marks=refused, lost_writes=[chunk for chunk in lost if chunk not in refused])

    def tell(self) -> None:
        """Tells the server what is committed in memory. Does not wait."""
        told, self._committed = self._committed, []
        self._client.commit(told)

    # --- the end --------------------------------------------------------------------------------------------------

    def complete(self) -> int:
        """Commits what was copied and tells the server; how many chunks. After a copy that failed, or none, gives all back.

        Waits for the copies. Calling it again is harmless.
        """
        if self._stored is None:
            if not self._copied:
                self.abort()
                return 0
            try:
                self.commit_records()
                self._stored = len(self._committed)
                self.tell()
            except BaseException:
                self.abort()
                raise
            logger.debug("stored %s", KeyText([self._keys[index] for index in self.granted.tolist()]))
            self._release()
        return self._stored

    def abort(self) -> None:
        """Gives back what is not committed, once no copy of it is running. Harmless when called twice, or after ``complete``."""
        if self._stored is None:
            self._stored = len(self._committed)
            self._settle()
            for number, use in self._uses.items():
                if number not in self._enqueued:
                    use.segment.fence()
            kept = set(self._committed)
            self.tell()
            self._client.abort([item for item in self.placements["generation"].tolist() if item not in kept])
            self._release()

    def _await_copies(self) -> None:
        if self._copies is not None:
            self._copies.synchronize()

    def _settle(self) -> None:
        """Waits until nothing enqueued touches records or payloads any more."""
        self._await_copies()
        for write in self._enqueued.values():
            if write is not None:
                write.end()

    def _release(self) -> None:
        self._settle()
        for use in self._uses.values():
            use.release()

    def _enqueue(self, part: Part, kv: PagedKV, block_ids: Int64Array) -> None:
        """Marks and copies by kernels, which write nothing where a record is not free."""
        from vcache.pool.enqueued_records import EnqueuedWrite  # needs triton
        from vcache.transfer import cuda

        write = EnqueuedWrite(part.segment, part.records, self._rows()[part.chunks], device=kv.device)
        self._enqueued[part.number] = write
        wanted = write.mark()
        try:
            cuda.gather(kv, block_ids, part.segment.tensor, part.offsets, wanted=wanted)
        finally:
            write.copied()

    def _map(self, granted: Granted) -> None:
        self.outcomes = [Outcome(outcome) for outcome in granted.outcomes]
        self.granted = np.array(
            [index for index, outcome in enumerate(granted.outcomes) if outcome == Outcome.GRANTED], dtype=np.int64
        )
        self.placements = granted.placements
        for number, info in granted.infos.items():
            use = self._client.use_segment(info)
            if use is not None:
                self._uses[number] = use
        unmapped = []
        for index, (number, _, _, offset, nbytes) in enumerate(self.placements.tolist()):
            use = self._uses.get(number)
            if use is None or not use.segment.contains(offset, nbytes) or nbytes != self.nbytes:
                unmapped.append(index)
        self._give_back(unmapped_grants=unmapped)
        if self._device is not None and self._device.type == "cuda":
            self._give_back(unpinned_grants=self._unpinned())
        self._parts = self._parted()

    def _unpinned(self) -> list[int]:
        """Of ``granted``, those into which a copy would wait for the device. Host memory that is being pinned now is waited for."""
        patience_s = self._client.config.client.call_timeout
        ready = [number for number, use in self._uses.items() if use.await_pinned(patience_s)]
        unready: list[int] = np.flatnonzero(~np.isin(self.placements["segment"], ready)).tolist()
        return unready

    def _give_back(self, **those: list[int]) -> None:
        """Indices in ``granted``, by the counter of what became of them."""
        if any(those.values()):
            which = np.zeros(len(self.granted), dtype=np.bool_)
            for counter, indices in those.items():
                which[indices] = True
                self._client.count(counter, len(indices))
            for index in self.granted[which].tolist():
                self.outcomes[index] = Outcome.DECLINED
            self._client.abort(self.placements["generation"][which].tolist())
            self.granted, self.placements = self.granted[~which], self.placements[~which]
            self._parts = self._parted()

    def _parted(self) -> list[Part]:
        return parted(self.placements, self._uses.items(), in_one=len(self._uses) == 1)

    def _rows(self) -> WordArray:
        keys = key_words(b"".join(self._keys))
        parent = self._parent or bytes(KEY_BYTES)
        before = key_words(parent + b"".join(self._keys[:-1]) if self._chained else parent * len(self._keys))
        run = self._run
        if run.ttl_s:
            run = replace(run, expires_s=int(time.time()) + run.ttl_s)
        return pack(
            run,
            keys=keys[self.granted],
            parents=before[self.granted],
            offsets=self.placements["offset"],
            nbytes=self.placements["nbytes"],
            generations=self.placements["generation"],
        )
