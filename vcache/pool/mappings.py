"""The segments this process has mapped, by (segment id, incarnation): never by address, which the next segment may get too.

A mapping is opened when first used (or ahead of use), and closed when its segment is gone, or nobody has used it for a while
(what is mapped stays allocated even after its donor has freed it), and the last user is done: never under a running copy,
nor under a kernel that is queued. So whoever enqueues work on a segment holds its ``Use`` until that work has *happened*: a
``PendingRead`` releases after its records were read behind the copy, a ``PendingWrite`` after its fence. What was
closed for idleness is mapped again by its next user, on the spot.

A segment of this very process is used where it is, by its local pointer. Segments of other hosts come and go with the
others, and are read by ``vcache/remote``.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

from vcache.errors import UnavailableError, VCacheError
from vcache.failures import FailureLog
from vcache.memory.base import Memory, is_host
from vcache.memory.copying import aside
from vcache.memory.host import HostMemory
from vcache.pool.runtime_dir import RuntimeDir
from vcache.pool.segment import Segment
from vcache.protocol import SegmentInfo
from vcache.transfer_config import TransferConfig

if TYPE_CHECKING:
    from vcache.memory.pinned import Pinning
    from vcache.remote.segments import RemoteSegment, RemoteSegments

logger = logging.getLogger(__name__)

Identity = tuple[bytes, int]
_STOP: Final = None


class Use:
    """A segment in use: it stays mapped until ``release``. Not thread-safe."""

    __slots__ = ("_entry", "_mappings", "segment")

    def __init__(self, mappings: Mappings, entry: _Entry) -> None:
        self._mappings = mappings
        self._entry: _Entry | None = entry
        self.segment = entry.segment

    def await_pinned(self, timeout_s: float) -> bool:
        """Whether a GPU's copies from and to it wait for nobody. For host memory that is being pinned now this waits, but once only."""
        entry = self._entry
        return entry is not None and self._mappings._await_pinned(entry, timeout_s)

    def release(self) -> None:
        """Harmless when called twice."""
        entry, self._entry = self._entry, None
        if entry is not None:
            self._mappings._done(entry)


class _Entry:
    __slots__ = ("dropped", "idle_since", "is_local", "may_be_pinned", "pinning", "segment", "unlisted_since", "users")

    def __init__(self, segment: Segment, *, is_local: bool) -> None:
        self.segment = segment
        self.is_local = is_local
        self.users = 0
        self.dropped = False
        self.idle_since: float | None = None  # as ``unmap_idle`` saw it: using a segment reads no clock
        self.unlisted_since: float | None = None
        self.pinning: Pinning | None = None
        self.may_be_pinned = False  # soon: worth waiting for

    def unpin(self) -> None:
        """Once nobody uses it. Harmless when called twice."""
        if self.pinning is not None:
            self.pinning.end()

    def close(self) -> None:
        """As ``unpin``. Not of this process's own, which its donor closes."""
        self.unpin()
        self.segment.close()


class Mappings:
    """Thread-safe. ``close`` when the client closes."""

    def __init__(
        self,
        runtime: RuntimeDir,
        *,
        host: bytes,
        device: str = "cpu:0",
        settings: TransferConfig | None = None,
        remote: RemoteSegments | None = None,
    ) -> None:
        """``device``: where this process's planes are, if it has any; ``remote``: segments of other hosts, if they are read; closed with this."""
        self._runtime = runtime
        self._host = host
        self._device = device
        self._has_gpu = bool(device) and not is_host(device)
        self._settings = settings or TransferConfig()
        self.remote: Final = remote
        self._changed = threading.Condition()
        self._entries: dict[Identity, _Entry] = {}
        self._opening: set[Identity] = set()
        self._failures = FailureLog(logger)
        self._closed = False
        self._work: queue.SimpleQueue[SegmentInfo | _Entry | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None

    def use(self, info: SegmentInfo) -> Use | None:
        """The segment, mapped until the answer is released; ``None`` when it is another host's or cannot be mapped.

        Opening may take a while (a donor is asked for its VRAM); only who wants the same segment waits for that.
        """
        if info.host != self._host:
            return None
        identity = info.segment_id, info.incarnation
        with self._changed:
            entry = self._entries.get(identity)
            if entry is None:
                self._changed.wait_for(lambda: identity not in self._opening)
                entry = self._entries.get(identity)
            if entry is not None:
                return self._used(entry)
            if self._closed:
                return None
            self._opening.add(identity)
        segment = None
        try:
            segment = self._opened(info)
        finally:
            with self._changed:
                self._opening.discard(identity)
                self._changed.notify_all()
                use = self._used(self._entered(identity, segment)) if segment is not None else None
        return use

    def use_remote(self, infos: Iterable[SegmentInfo]) -> Mapping[int, RemoteSegment]:
        """Those of these segments, by number, that are another host's and can be read now; the first time waits for them."""
        others = [info for info in infos if info.host != self._host]
        return self.remote.use(others) if self.remote is not None and others else {}

    def map_ahead(self, infos: Iterable[SegmentInfo]) -> None:
        """Maps segments in a thread of its own, before their first use."""
        for info in infos:
            if info.host == self._host or self.remote is not None:
                self._hand_over(info)

    def adopt(self, segment: Segment) -> None:
        """A segment of this process, under its present incarnation. Its donor goes on owning it."""
        with self._changed:
            entry = next((entry for entry in self._entries.values() if entry.segment is segment), None)
            if entry is None:
                entry = _Entry(segment, is_local=True)
                self._make_fit(entry)
            self._entries[segment.segment_id, segment.incarnation] = entry

    def give_up(self, segment: Segment, timeout_s: float) -> bool:
        """Forgets every incarnation of a segment of this process; whether all its users were done in time."""
        with self._changed:
            mine = [key for key, entry in self._entries.items() if entry.segment is segment]
            entries = {self._entries.pop(key) for key in mine}
            for entry in entries:
                entry.dropped = True
            is_unused = self._changed.wait_for(lambda: not any(entry.users for entry in entries), timeout=timeout_s)
        if is_unused:
            for entry in entries:
                entry.unpin()
        return is_unused

    def drop(self, identity: Identity) -> None:
        """The segment is gone: unmapped at once, or when its last user is done."""
        with self._changed:
            entry = self._entries.get(identity)
            if entry is not None and not entry.is_local:
                self._drop(identity, entry)
        if self.remote is not None:
            self.remote.drop(identity)

    def drop_unlisted(self, listed: Iterable[Identity], now: float, grace_s: float) -> None:
        """Drops what the server has not listed for ``grace_s``: its donor died while the server was away."""
        known = set(listed)
        if self.remote is not None:
            self.remote.drop_all_but(known)
        with self._changed:
            for identity, entry in list(self._entries.items()):
                if identity in known or entry.is_local:
                    entry.unlisted_since = None
                elif entry.unlisted_since is None:
                    entry.unlisted_since = now
                elif now - entry.unlisted_since > grace_s:
                    self._drop(identity, entry)

    def unmap_idle(self, now: float) -> None:
        """Drops what nobody has used for ``transfer.unmap_after``, by calls that were made all the while.

        Segments of other hosts are not mapped, only read: they take nothing here.
        """
        after_s = self._settings.unmap_after
        if not after_s:
            return
        with self._changed:
            for identity, entry in list(self._entries.items()):
                if entry.users or entry.is_local:
                    entry.idle_since = None
                elif entry.idle_since is None:
                    entry.idle_since = now
                elif now - entry.idle_since > after_s:
                    self._drop(identity, entry)

    def mapped(self) -> list[Identity]:
        """What is mapped now, this process's own segments and other hosts' among it."""
        others = self.remote.identities() if self.remote is not None else []
        with self._changed:
            return [*self._entries, *others]

    def close(self) -> None:
        """Unmaps everything that is not in use; the rest when its users are done. Nothing is mapped afterwards."""
        with self._changed:
            self._closed = True
            for identity, entry in list(self._entries.items()):
                if not entry.is_local:
                    self._drop(identity, entry)
            worker, self._worker = self._worker, None
        if self.remote is not None:
            self.remote.close()
        if worker is not None:
            self._work.put(_STOP)
            worker.join()

    def _opened(self, info: SegmentInfo) -> Segment | None:
        try:
            memory = _open_memory(self._runtime, info, reader=self._device)
        except (OSError, VCacheError) as error:
            self._failures.record(f"map segment of {info.device}", error)
            return None
        try:
            with aside(memory):  # whoever maps it does not wait for what this thread has a GPU compute
                segment = Segment.open(memory, info.segment_id, info.incarnation)
        except VCacheError as error:
            memory.close()
            self._failures.record(f"map segment of {info.device}", error)
            return None
        logger.info("mapped segment %s incarnation %d (%s)", info.segment_id.hex(), info.incarnation, info.device)
        return segment

    # --- with the lock held ---------------------------------------------------------------------------------------

    def _used(self, entry: _Entry) -> Use:
        entry.users += 1
        entry.idle_since = None
        return Use(self, entry)

    def _entered(self, identity: Identity, segment: Segment) -> _Entry:
        """What was opened, for others too; unless all was closed meanwhile, or it is this process's: then it goes with its one user."""
        entry = _Entry(segment, is_local=False)
        if self._closed or identity in self._entries:
            entry.dropped = True
        else:
            self._entries[identity] = entry
            self._make_fit(entry)
        return entry

    def _make_fit(self, entry: _Entry) -> None:
        """Before its first use, if there is time. To this process's own memory there is nothing to do but to pin it."""
        entry.may_be_pinned = self._has_gpu and isinstance(entry.segment.memory, HostMemory)
        if entry.may_be_pinned or not entry.is_local:
            self._hand_over(entry)

    def _await_pinned(self, entry: _Entry, timeout_s: float) -> bool:
        with self._changed:
            if not self._changed.wait_for(lambda: not entry.may_be_pinned, timeout_s):
                entry.may_be_pinned = False  # that takes longer than others should wait, too
            return entry.pinning is not None or not isinstance(entry.segment.memory, HostMemory)

    def _drop(self, identity: Identity, entry: _Entry) -> None:
        del self._entries[identity]
        entry.dropped = True
        if not entry.users:
            self._unmap(entry)

    def _unmap(self, entry: _Entry) -> None:
        logger.info("unmapping segment %s incarnation %d", entry.segment.segment_id.hex(), entry.segment.incarnation)
        if self._worker is None or self._is_on_host(entry):
            entry.close()
        else:
            self._work.put(entry)  # it waits for the device, which whoever was the last user must not

    def _done(self, entry: _Entry) -> None:
        with self._changed:
            entry.users -= 1
            if not entry.users:
                self._changed.notify_all()
                if entry.dropped and not entry.is_local:
                    self._unmap(entry)

    def _is_on_host(self, entry: _Entry) -> bool:
        """Whether no GPU has to do with it, neither its own nor this process's."""
        return is_host(entry.segment.memory.device) and not self._has_gpu

    # --- the thread that maps ahead, makes fit for use what was mapped, and closes what a GPU may be at --------------

    def _hand_over(self, work: SegmentInfo | _Entry) -> None:
        with self._changed:
            if self._closed:
                return
            if self._worker is None:
                self._worker = threading.Thread(target=self._run, name="vcache-mappings", daemon=True)
                self._worker.start()
            self._work.put(work)

    def _run(self) -> None:
        while (work := self._work.get()) is not _STOP:
            with self._failures.contained("map segments"):
                if isinstance(work, _Entry):
                    self._prepare_or_close(work)
                elif work.host == self._host:
                    use = self.use(work)
                    if use is not None:
                        use.release()
                elif self.remote is not None:
                    self.remote.open_ahead(work)

    def _prepare_or_close(self, entry: _Entry) -> None:
        memory = entry.segment.memory
        if isinstance(memory, HostMemory) and not self._has_gpu:
            memory.populate()  # ends when the memory is closed meanwhile
            return
        with self._changed:
            is_wanted = not entry.dropped
            entry.users += is_wanted
            is_over = not entry.users and not entry.is_local
        if is_wanted:
            try:
                self._prepare(entry)
            finally:
                with self._changed:
                    entry.may_be_pinned = False
                    self._changed.notify_all()
                self._done(entry)
        elif is_over:
            entry.close()

    def _prepare(self, entry: _Entry) -> None:
        """What a process with a GPU does with a segment once, before its first copies if it is fast enough."""
        memory = entry.segment.memory
        if isinstance(memory, HostMemory):
            from vcache.memory.pinned import pin

            try:
                entry.pinning = pin(memory, device=self._device)
            except UnavailableError as error:
                logger.warning(
                    "%d bytes of host memory are not pinned (%s): a GPU loads from them more slowly, and does not store into them",
                    memory.nbytes,
                    error,
                )
                memory.populate()
        elif self._has_gpu and memory.device != self._device:
            from vcache.transfer.ways import attach

            attach(
                memory.tensor,
                entry.segment.data_offset,
                reader=self._device,
                owner=memory.device,
                setting=self._settings.peer_way,
            )


def _open_memory(runtime: RuntimeDir, info: SegmentInfo, *, reader: str) -> Memory:
    """``reader``: the device that will read it; a process whose planes are in host memory reads a GPU's through that GPU."""
    if is_host(info.device):
        return HostMemory.open(runtime, info.handle, info.nbytes, device=info.device)
    from vcache.memory.cuda import CudaMemory

    through = info.device if not reader or is_host(reader) else reader
    return CudaMemory.open(runtime, info.handle, info.nbytes, device=info.device, reader=through)
