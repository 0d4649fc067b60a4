"""Host memory shared between processes: a file in tmpfs, every page of it allocated before anybody maps it.

Raw POSIX shared memory, not Python's SharedMemory: in 3.11 a reader of that unlinks the owner's segment on exit.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import platform
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from vcache.errors import CapacityError, CorruptionError, UnavailableError
from vcache.memory.base import IndexArray, WordArray
from vcache.pool.runtime_dir import HeldFile, RuntimeDir, segment_file_name
from vcache.units import approximate_size, format_size

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_MADV_HUGEPAGE: Final = 14
_MADV_POPULATE_WRITE: Final = 23
#: Pages are made present in steps of this size, so that closing never waits long for it.
_POPULATE_STEP: Final = 16 << 20

# Through ctypes, which lets other threads run meanwhile; mmap.madvise and MAP_POPULATE hold the GIL (0.3 s for 4 GiB).
_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_statfs = ctypes.CDLL(None, use_errno=True).statfs
#: ``f_type`` of file systems that live in memory: tmpfs, ramfs, hugetlbfs.
_MEMORY_FILE_SYSTEMS: Final = frozenset({0x01021994, 0x858458F6, 0x958458F6})


class HostWords:
    """Words of mapped host memory.

    Item assignment to a memoryview of format "Q" is one aligned 8-byte store, and a numpy gather reads 8-byte items
    whole; ``struct.pack_into`` tears (seen by another process in 3-15% of reads). x86 keeps stores, and loads, in order.
    """

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._array: WordArray = np.frombuffer(view, dtype=np.uint64)
        self._barrier = threading.Lock()

    def load(self, index: int) -> int:
        return int(self._view[index])

    def store(self, index: int, value: int) -> None:
        self._view[index] = value

    def store_run(self, start: int, values: WordArray) -> None:
        view = self._view
        for index, value in enumerate(values.tolist(), start):  # not a slice: memmove may store any way it likes
            view[index] = value

    def load_each(self, indices: IndexArray) -> WordArray:
        return self._array[indices]

    def load_run(self, start: int, count: int) -> WordArray:
        return self._array[start : start + count].copy()

    def fence(self) -> None:
        # Large copies may use non-temporal stores, which x86 does not order with later ones. A locked instruction
        # does, and taking a lock is one.
        with self._barrier:
            pass

    def release(self) -> None:
        """Lets go of the memory; a call under way in another thread keeps it until it ends."""
        del self._array
        with contextlib.suppress(BufferError):
            self._view.release()


class HostMemory:
    """Shared host memory. ``create`` makes and owns it, ``open`` maps another process's."""

    def __init__(self, mapping: mmap.mmap, *, handle: bytes, device: str, owned: HeldFile | None) -> None:
        self.device = device
        self.nbytes = len(mapping)
        self.handle = handle
        self.words = HostWords(memoryview(mapping).cast("B").cast("Q"))
        self.address = int(np.frombuffer(mapping, dtype=np.uint8).ctypes.data)
        self._mapping = mapping
        self._owned = owned
        self._tensor: torch.Tensor | None = None
        self._lock = threading.Lock()
        self._closed = False
        # An owner that ends without closing leaves nothing behind; a forked child owns nothing.
        self._at_exit = weakref.finalize(self, _remove_if_mine, owned, os.getpid())

    @classmethod
    def create(cls, runtime: RuntimeDir, segment_id: bytes, nbytes: int, *, device: str = "cpu:0") -> HostMemory:
        """Allocates ``nbytes`` (whole pages), all of it present. The caller owns it and must ``close`` it.

        Raises ``CapacityError`` naming both numbers when there is less, before anything exists; ``UnavailableError`` on
        machines whose memory ordering is not x86's.
        """
        require_x86()
        if nbytes <= 0 or nbytes % mmap.PAGESIZE:
            raise ValueError(f"nbytes = {nbytes}: must be a positive multiple of {mmap.PAGESIZE}")
        _require_free(runtime, nbytes)
        if not _is_in_memory(runtime.path):
            logger.warning(
                "runtime_dir = %s is on a disk: the system writes the segment to it; use a directory in shared memory, "
                "such as /dev/shm/vcache",
                runtime.path,
            )
        file = runtime.create_segment_file(segment_id)
        try:
            os.truncate(file.fd, nbytes)
            mapping = _map(file, nbytes)
            # Huge pages where the system allows them to who asks; fallocate alone would never use them.
            _advise(mapping, 0, nbytes, _MADV_HUGEPAGE)
            _populate(mapping)
            os.posix_fallocate(file.fd, 0, nbytes)  # a page that is not there would kill (SIGBUS) whoever touches it
        except OSError as error:
            file.unlink()
            file.close()
            if error.errno in {errno.ENOSPC, errno.ENOMEM, errno.EFAULT}:
                raise _too_little(nbytes, *_free_bytes(runtime)) from error
            raise
        return cls(mapping, handle=segment_file_name(segment_id).encode(), device=device, owned=file)

    @classmethod
    def open(cls, runtime: RuntimeDir, handle: bytes, nbytes: int, *, device: str = "cpu:0") -> HostMemory:
        """Maps what another process of this host made.

        Raises ``OSError`` when it is gone, ``CorruptionError`` when it has another size than announced.
        """
        require_x86()
        name = handle.decode("ascii", errors="replace")
        fd = runtime.open_segment_file(name)
        try:
            actual = os.fstat(fd).st_size
            if actual != nbytes:
                raise CorruptionError(f"{name} has {actual} bytes, {nbytes} were announced")
            mapping = mmap.mmap(fd, nbytes)
        finally:
            os.close(fd)
        return cls(mapping, handle=handle, device=device, owned=None)

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """uint8 ``[nbytes]`` over the mapping, which lives for as long as any such array or view of one."""
        with self._lock:
            if self._closed:
                raise UnavailableError("the segment's memory was closed")
            return np.frombuffer(self._mapping, dtype=np.uint8)

    @property
    def tensor(self) -> torch.Tensor:
        """uint8 ``[nbytes]`` over the mapping, which lives for as long as any such tensor or view of one."""
        tensor = self._tensor
        if tensor is not None:
            return tensor
        import torch  # here, since it costs 230 MB and 1.2 s, and a stand-alone donor never needs it

        with self._lock:
            if self._closed:
                raise UnavailableError("the segment's memory was closed")
            # By way of numpy, whose array keeps the mmap from closing: torch.frombuffer does not, and a tensor that
            # outlived close() would crash the process.
            with torch.inference_mode(False):  # what is made in that mode cannot be written outside of it
                self._tensor = torch.from_numpy(np.frombuffer(self._mapping, dtype=np.uint8))
            return self._tensor

    def populate(self) -> None:
        """Makes all pages present in this process's page table, so that first copies pay no faults (they halve them).

        Lets other threads run, and ends early when the memory is closed meanwhile. A kernel that cannot (before 5.14)
        leaves it to the copies.
        """
        for start in range(0, self.nbytes, _POPULATE_STEP):
            with self._lock:
                if self._closed or not _advise(
                    self._mapping, start, min(_POPULATE_STEP, self.nbytes - start), _MADV_POPULATE_WRITE
                ):
                    return

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._tensor = None
            self.words.release()
            # While somebody holds a tensor over the mapping it cannot be unmapped, and must not be: the tensor's buffer
            # keeps the mapping alive, and the last one to let go of it unmaps it.
            with contextlib.suppress(BufferError):
                self._mapping.close()
            self._at_exit()


def require_x86() -> None:
    """Raises ``UnavailableError`` where words that processes share would need more than x86's ordering."""
    machine = platform.machine().lower()
    if machine not in {"x86_64", "amd64"}:
        raise UnavailableError(
            f"host segments are shared between processes on x86-64 only: the record protocol relies on its memory "
            f"ordering, and this machine is {machine}; use VRAM segments here"
        )


def _map(file: HeldFile, nbytes: int) -> mmap.mmap:
    """A mapping that does not hold the file's lock: a forked child keeps the mapping, and must not keep its parent alive."""
    fd = os.open(file.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return mmap.mmap(fd, nbytes)
    finally:
        os.close(fd)


def _remove_if_mine(owned: HeldFile | None, pid: int) -> None:
    if owned is not None and os.getpid() == pid:
        owned.unlink()
        owned.close()


def _advise(mapping: mmap.mmap, start: int, nbytes: int, advice: int) -> bool:
    """Whether the system took the advice. Raises ``OSError`` when pages could not be had."""
    address = int(np.frombuffer(mapping, dtype=np.uint8).ctypes.data)
    if _madvise(address + start, nbytes, advice) == 0:
        return True
    code = ctypes.get_errno()
    if code in {errno.EFAULT, errno.ENOMEM}:
        raise OSError(code, os.strerror(code))
    return False


def _populate(mapping: mmap.mmap) -> None:
    for start in range(0, len(mapping), _POPULATE_STEP):
        if not _advise(mapping, start, min(_POPULATE_STEP, len(mapping) - start), _MADV_POPULATE_WRITE):
            return


def _require_free(runtime: RuntimeDir, nbytes: int) -> None:
    free, where = _free_bytes(runtime)
    if nbytes > free:
        raise _too_little(nbytes, free, where)


def _is_in_memory(path: Path) -> bool:
    """Whether files in this directory are memory; true where the system does not say."""
    status = (ctypes.c_long * 32)()  # struct statfs begins with f_type and is smaller than this
    return _statfs(os.fsencode(path), status) != 0 or status[0] in _MEMORY_FILE_SYSTEMS


def _too_little(nbytes: int, free: int, where: str) -> CapacityError:
    return CapacityError(
        f"a segment of {format_size(nbytes)} was asked for, {approximate_size(free)} are free {where}; use a smaller segment.size, or make "
        "room (shared memory of a container: --shm-size)"
    )


def _free_bytes(runtime: RuntimeDir) -> tuple[int, str]:
    """Free bytes and where: in the file system, or in the machine if that has less."""
    status = os.statvfs(runtime.path)
    free = status.f_bavail * status.f_frsize
    available = available_memory()
    if available is not None and available < free:
        return available, "in this machine's memory (MemAvailable)"
    return free, f"in the file system of {runtime.path}"


def available_memory() -> int | None:
    """Bytes that new processes of this machine can have; None where the system does not say."""
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
