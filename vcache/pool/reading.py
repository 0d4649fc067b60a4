"""The read path: acquire a run, copy its payloads, and only then find out whether what was copied is what was asked for.

A lease makes it likely that nobody overwrites a payload meanwhile; the validation after the copy is what makes it safe. Of a
segment of another host payload and record are read, in this order, into memory of this process, and validated there.

Copies to a GPU's planes are only enqueued, and nobody waits for the device until ``complete`` (but for what comes from another
host, and where host memory is not pinned). Behind a copy that a kernel makes within VRAM, kernels validate
(``enqueued_records.py``); of host memory the records are looked at once the stream has come past the copy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import numpy.typing as npt

from vcache.keys import ChunkKey
from vcache.log import KeyText
from vcache.pool.client import PLACEMENT_DTYPE, PlacementArray, PoolClient
from vcache.pool.mappings import Use
from vcache.pool.parts import Part, parted
from vcache.pool.records import LAYOUT, hold, key_words
from vcache.pool.segment import Segment
from vcache.remote.fetch import fetched

if TYPE_CHECKING:
    import torch

    from vcache.paged_kv import PagedKV
    from vcache.pool.enqueued_records import EnqueuedRead
    from vcache.remote.segments import RemoteSegment
    from vcache.transfer.events import Event

logger = logging.getLogger(__name__)

Int64Array = npt.NDArray[np.int64]


class Source(Protocol):
    """Memory with payloads in it: a segment, or what was read from one of another host."""

    @property
    def tensor(self) -> torch.Tensor:
        """All of it as uint8, no copy."""


#: Copies the payloads at ``offsets`` of a source to where the chunks with these indices in the run belong.
CopyOut = Callable[[Source, Int64Array, Int64Array], None]

_NO_REMOTE: Final[Mapping[int, RemoteSegment]] = MappingProxyType({})
_NOTHING: PlacementArray = np.empty(0, dtype=PLACEMENT_DTYPE)


def begin_read(client: PoolClient, keys: Sequence[ChunkKey], rank: int) -> PendingRead:
    """Leases the leading run of ``keys`` that is in the pool and that this process can map. One round trip.

    Never raises because something is unavailable: the run is then empty. The answer must be completed.
    """
    acquired = client.acquire(b"".join(keys), rank) if keys else None
    if acquired is None:
        return PendingRead(client, keys, lease=0, placements=_NOTHING, uses=())
    uses: dict[int, Use] = {}
    try:
        for number, info in acquired.infos.items():
            use = client.use_segment(info)
            if use is not None:
                uses[number] = use
        remote = client.mappings.use_remote(acquired.infos.values())
        hits = _readable(acquired.placements, {number: use.segment for number, use in uses.items()} | dict(remote))
        if hits < len(acquired.placements):
            client.count("unmapped_hits", len(acquired.placements) - hits)
        return PendingRead(
            client,
            keys,
            lease=acquired.lease,
            placements=acquired.placements[:hits],
            uses=tuple(uses.items()),
            remote=remote,
        )
    except BaseException:
        for use in uses.values():
            use.release()
        client.release(acquired.lease)
        raise


class PendingRead:
    """A leased run. Copy it, then ``complete``; until that answers, nothing that was copied may be used.

    ``hits``: chunks in the run; ``placements``: ``PLACEMENT_DTYPE`` ``[hits]``. Not thread-safe.
    """

    def __init__(
        self,
        client: PoolClient,
        keys: Sequence[ChunkKey],
        *,
        lease: int,
        placements: PlacementArray,
        uses: tuple[tuple[int, Use], ...],
        remote: Mapping[int, RemoteSegment] = _NO_REMOTE,
    ) -> None:
        self.placements = placements
        self._client = client
        self._keys = keys
        self._lease = lease
        self._uses = uses
        self._remote = remote
        self._parts = self._parted()
        #: Of each chunk: its payload was copied; and, of another host's, the record read after it is the right one.
        self._copied = np.zeros(len(placements), dtype=np.bool_)
        self._held = np.zeros(len(placements), dtype=np.bool_)
        #: Behind the copies that were enqueued; None: there are none.
        self._copies: Event | None = None
        #: Parts that were copied by kernels, as they were then.
        self._enqueued: list[tuple[Part, EnqueuedRead]] = []
        self._valid: int | None = None

    @property
    def hits(self) -> int:
        return len(self.placements)

    @property
    def segments(self) -> list[Segment]:
        """Those of this host that the run is in. Mapped until ``complete``."""
        return [use.segment for _, use in self._uses]

    def cut(self, nbytes: int, layout: int) -> int:
        """Ends the run before the first payload of another size or layout; how many chunks are left.

        Of other hosts' payloads the layout is known only once they are read: ``copy_with`` is to be told it, too.
        """
        self._cut(nbytes, layout)
        return self.hits

    def copy_to(self, kv: PagedKV, block_ids: Int64Array) -> None:
        """Copies the run's payloads into blocks ``[hits, blocks per chunk]``; to planes on a GPU, enqueues it on the current stream.

        A payload of another size than these blocks, or gathered from planes of another form, ends the run before it: two
        processes that describe their models alike may hold KV in different ways. Within VRAM the form is seen behind the copy, so
        that ``complete`` ends the run there. Raises ``ValueError`` for bad block ids.
        """
        from vcache.transfer import recorded, scatter, settled  # loads torch

        def copy_out(source: Source, chunks: Int64Array, offsets: Int64Array) -> None:
            scatter(kv, block_ids[chunks], source.tensor, offsets, threads=threads)

        def copy_out_at_once(source: Source, chunks: Int64Array, offsets: Int64Array) -> None:
            with settled(kv.device):
                copy_out(source, chunks, offsets)

        layout, threads = kv.payload_layout, self._client.config.transfer.threads
        by_kernel = {part.number for part in self._parts if part.segment.is_copied_by_kernels(kv.device)}
        self._cut(kv.payload_bytes(block_ids.shape[1]), layout, besides=by_kernel)
        try:
            for part in self._parts:
                if part.number in by_kernel:
                    self._enqueue(part, copy_out, layout, kv.device)
                else:
                    self._copy(part, copy_out)
        finally:
            if kv.device.type == "cuda":
                self._copies = recorded(kv.device)
        self._copy_from_elsewhere(copy_out_at_once, layout=layout)

    def copy_with(self, copy_out: CopyOut, *, layout: int | None = None) -> None:
        """Copies by a function of the caller, called once per segment, or several times for one of another host.

        Payloads of other hosts are in host memory, valid until the function returns. ``layout``: of the payloads wanted.
        """
        for part in self._parts:
            self._copy(part, copy_out)
        self._copy_from_elsewhere(copy_out, layout=layout)

    def _copy(self, part: Part, copy_out: CopyOut) -> None:
        copy_out(part.segment, part.chunks, part.offsets)
        self._copied[part.chunks] = True

    def _enqueue(self, part: Part, copy_out: CopyOut, layout: int, device: torch.device) -> None:
        from vcache.pool.enqueued_records import EnqueuedRead  # needs triton

        keys = key_words(b"".join(self._keys))[part.chunks]
        read = EnqueuedRead(part.segment, part.records, part.generations, keys, layout=layout, device=device)
        self._enqueued.append((part, read))
        try:
            self._copy(part, copy_out)
        finally:
            read.copied()

    def _copy_from_elsewhere(self, copy_out: CopyOut, *, layout: int | None = None) -> None:
        """Reads what lies on other hosts, and copies those payloads whose record says that they are what was asked for.

        It ends where a donor does not deliver, or where a payload has another layout than ``layout``.
        """
        if not self._remote:
            return
        segments = self._client.mappings.remote
        assert segments is not None, "somebody opened these"
        keys = key_words(b"".join(self._keys[: self.hits]))
        with closing(fetched(segments, self.placements, self._remote)) as batches:
            for batch in batches:
                rows = self.placements[batch.chunks]
                held = hold(batch.rows, rows["generation"], keys[batch.chunks])
                if layout is not None:
                    fits = np.ones(self.hits, dtype=np.bool_)
                    fits[batch.chunks] = ~held | (batch.rows[:, LAYOUT] == layout)
                    self._end_before_misfit(fits)
                wanted = held & (batch.chunks < self.hits)
                if wanted.any():
                    copy_out(segments.reader.staging, batch.chunks[wanted], batch.offsets[wanted])
                self._copied[batch.chunks] = True
                self._held[batch.chunks] = held
                self._client.count("remote_hits", int(wanted.sum()))
                self._client.count("remote_read_bytes", int(rows["nbytes"][wanted].sum()))
                if not wanted.all():
                    break  # what follows is of no use
        lost = np.isin(self.placements["segment"], list(self._remote)) & ~self._copied[: self.hits]
        self._client.count("remote_lost_hits", int(lost.sum()))

    def _cut(self, nbytes: int, layout: int, *, besides: Collection[int] = ()) -> None:
        """``besides``: segments whose layouts are not looked at yet."""
        fits = self.placements["nbytes"] == nbytes
        for part in self._parts:  # what other hosts' records say comes with the payload
            if part.number not in besides:
                fits[part.chunks] &= part.segment.layouts(part.records) == layout
        self._end_before_misfit(fits)

    def _end_before_misfit(self, fits: npt.NDArray[np.bool_]) -> None:
        if not fits.all():
            fitting = int(np.argmin(fits))
            self._client.count("misfit_hits", self.hits - fitting)
            self.placements = self.placements[:fitting]
            self._parts = self._parted()

    def complete(self) -> int:
        """Leading chunks whose bytes, all of them, are those of their keys. Ends the lease, with the verdict.

        What was not copied ends the run. Calling it again is harmless.
        """
        if self._valid is None:
            self._valid = 0
            invalid: list[int] = []
            try:
                valid = self._validated()
                copied = self._copied[: self.hits]
                valid &= copied
                if valid.all():
                    self._valid = self.hits
                else:
                    self._valid = int(np.argmin(valid))
                    invalid = np.flatnonzero(copied & ~valid).tolist()
            finally:
                self._end(invalid)
        return self._valid

    def _parted(self) -> list[Part]:
        return parted(self.placements, self._uses, in_one=len(self._uses) == 1 and not self._remote)

    def _validated(self) -> npt.NDArray[np.bool_]:
        """Which chunks of the run were there behind their copies. It ends before those that turn out to be of another layout."""
        if self._enqueued:
            self._hear_verdicts()
        self._await_copies()
        by_kernel = {part.number for part, _ in self._enqueued}
        valid = self._held[: self.hits].copy()
        keys = key_words(b"".join(self._keys[: self.hits]))
        for part in self._parts:
            if part.number not in by_kernel:
                valid[part.chunks] = part.segment.matches(part.records, part.generations, keys[part.chunks])
        return valid

    def _hear_verdicts(self) -> None:
        """Has kernels look at the records behind the copies, and waits for what they say."""
        fits = np.ones(len(self._held), dtype=np.bool_)
        for _, read in self._enqueued:
            read.validate()
        for part, read in self._enqueued:
            held, is_of_layout = read.outcome()
            self._held[part.chunks] = held
            fits[part.chunks] = ~held | is_of_layout
        self._end_before_misfit(fits[: self.hits])

    def _await_copies(self) -> None:
        if self._copies is not None:
            self._copies.synchronize()

    def _end(self, invalid: list[int]) -> None:
        self._await_copies()
        for _, read in self._enqueued:
            read.end()
        for _, use in self._uses:
            use.release()
        self._client.release(self._lease, self.placements["generation"][invalid].tolist() if invalid else ())
        if invalid:
            self._client.count("invalid_reads", len(invalid))
            logger.debug("read, but not valid any more: %s", KeyText([self._keys[index] for index in invalid]))
        if self._valid:
            logger.debug("read %s", KeyText(self._keys[: self._valid]))


def _readable(placements: PlacementArray, segments: Mapping[int, Segment | RemoteSegment]) -> int:
    """Leading placements that lie within segments that are mapped, or can be read where they are."""
    for index, (number, record, _, offset, nbytes) in enumerate(placements.tolist()):
        segment = segments.get(number)
        if segment is None or record >= segment.records or not segment.contains(offset, nbytes):
            return index
    return len(placements)
