"""The read path: acquire a run, copy its payloads, and only then find out whether what was copied is what was asked for.

A lease makes it likely that nobody overwrites a payload meanwhile; the validation after the copy is what makes it safe.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vcache.keys import ChunkKey
from vcache.log import KeyText
from vcache.pool.client import PLACEMENT_DTYPE, PlacementArray, PoolClient
from vcache.pool.mappings import Use
from vcache.pool.records import key_words
from vcache.pool.segment import Segment

if TYPE_CHECKING:
    from vcache.paged_kv import PagedKV

logger = logging.getLogger(__name__)

Int64Array = npt.NDArray[np.int64]
#: Copies the payloads at ``offsets`` of a segment to where the chunks with these indices in the run belong.
CopyOut = Callable[[Segment, Int64Array, Int64Array], None]

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
        hits = _readable(acquired.placements, uses)
        client.count("unmapped_hits", len(acquired.placements) - hits)
        return PendingRead(
            client, keys, lease=acquired.lease, placements=acquired.placements[:hits], uses=tuple(uses.items())
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
    ) -> None:
        self.placements = placements
        self._client = client
        self._keys = keys
        self._lease = lease
        self._uses = uses
        self._copied = False
        self._valid: int | None = None

    @property
    def hits(self) -> int:
        return len(self.placements)

    @property
    def segments(self) -> list[Segment]:
        """Those that the run is in. Mapped until ``complete``."""
        return [use.segment for _, use in self._uses]

    def copy_to(self, kv: PagedKV, block_ids: Int64Array) -> None:
        """Copies the run's payloads into blocks ``[hits, blocks per chunk]``; on a GPU, enqueues it on the current stream.

        A payload of another size than these blocks, or gathered from planes of another form, ends the run before it: two
        processes that describe their models alike may hold KV in different ways. Raises ``ValueError`` for bad block ids.
        """
        from vcache.transfer import scatter  # loads torch

        fits = (self.placements["nbytes"] == kv.payload_bytes(block_ids.shape[1])) & self._have_layout(
            kv.payload_layout
        )
        if not fits.all():
            fitting = int(np.argmin(fits))
            self._client.count("misfit_hits", self.hits - fitting)
            self.placements = self.placements[:fitting]
        threads = self._client.config.transfer.threads
        self.copy_with(
            lambda segment, chunks, offsets: scatter(kv, block_ids[chunks], segment.tensor, offsets, threads=threads)
        )

    def copy_with(self, copy_out: CopyOut) -> None:
        """Copies by a function of the caller, called once per segment."""
        for number, use in self._uses:
            chunks = np.flatnonzero(self.placements["segment"] == number)
            if chunks.size:
                copy_out(use.segment, chunks, self.placements["offset"][chunks].astype(np.int64))
        self._copied = True

    def complete(self) -> int:
        """Leading chunks whose bytes, all of them, are those of their keys. Ends the lease, with the verdict.

        After a copy that failed, or none, that is 0. Calling it again is harmless.
        """
        if self._valid is None:
            self._valid = 0
            invalid: list[int] = []
            try:
                if self._copied:
                    valid = self._validated()
                    invalid = np.flatnonzero(~valid).tolist()
                    self._valid = invalid[0] if invalid else self.hits
            finally:
                self._end(invalid)
        return self._valid

    def _have_layout(self, layout: int) -> npt.NDArray[np.bool_]:
        same = np.zeros(self.hits, dtype=np.bool_)
        for number, use in self._uses:
            chunks = np.flatnonzero(self.placements["segment"] == number)
            same[chunks] = use.segment.layouts(self.placements["record"][chunks].astype(np.int64)) == layout
        return same

    def _validated(self) -> npt.NDArray[np.bool_]:
        valid = np.zeros(self.hits, dtype=np.bool_)
        keys = key_words(b"".join(self._keys[: self.hits]))
        for number, use in self._uses:
            chunks = np.flatnonzero(self.placements["segment"] == number)
            rows = self.placements[chunks]
            valid[chunks] = use.segment.matches(rows["record"].astype(np.int64), rows["generation"], keys[chunks])
        return valid

    def _end(self, invalid: list[int]) -> None:
        for _, use in self._uses:
            use.release()
        self._client.release(self._lease, invalid)
        if invalid:
            self._client.count("invalid_reads", len(invalid))
            logger.debug("read, but not valid any more: %s", KeyText([self._keys[index] for index in invalid]))
        if self._valid:
            logger.debug("read %s", KeyText(self._keys[: self._valid]))


def _readable(placements: PlacementArray, uses: dict[int, Use]) -> int:
    """Leading placements that lie within segments that are mapped."""
    for index, (number, _, _, offset, nbytes) in enumerate(placements.tolist()):
        use = uses.get(number)
        if use is None or not use.segment.contains(offset, nbytes):
            return index
    return len(placements)
