"""A segment: a header that says what it is, a directory of records, then payloads; all in one piece of memory.

The header is the only thing a segment's mapping is believed by: a process that opens memory where another segment, or
another life of this one, is expected, finds out before it reads a byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vcache.errors import CapacityError, CorruptionError
from vcache.memory.base import IndexArray, Memory, WordArray, is_host
from vcache.pool.records import GENERATION, NBYTES, OFFSET, RECORD_BYTES, Directory, folded
from vcache.protocol import RecordInfo
from vcache.units import approximate_size, format_size

if TYPE_CHECKING:
    import torch

FORMAT_VERSION: Final = 1
PAGE_BYTES: Final = 4096
#: Extents begin and end at multiples of this.
EXTENT_ALIGNMENT: Final = 4096
MAGIC: Final = int.from_bytes(b"VCACHSEG", "little")
MIN_RECORDS: Final = 64
MAX_RECORDS: Final = 1 << 20
_BYTES_PER_RECORD: Final = 64 << 10
DIRECTORY_OFFSET: Final = PAGE_BYTES
_DIRECTORY_WORD: Final = DIRECTORY_OFFSET // 8

# Words of the header.
_MAGIC: Final = 0
_VERSION: Final = 1
_ID: Final = 2  # and 3
_INCARNATION: Final = 4
_NBYTES: Final = 5
_RECORDS: Final = 7  # behind the directory's offset
_DATA: Final = 8
_CHECKSUM: Final = 9
HEADER_WORDS: Final = 10


class Segment:
    """A segment in some memory. Made by ``create`` (its donor) or ``open`` (everybody else).

    Owns its memory: ``close`` closes it. What the methods on records promise, and who may call them, is said in
    ``records.Directory``. A segment must not be closed while another thread uses it (``mappings.Mappings`` sees to that).
    """

    def __init__(self, memory: Memory, *, segment_id: bytes, incarnation: int, records: int, data_offset: int) -> None:
        self.memory = memory
        self.segment_id = segment_id
        self.incarnation = incarnation
        self.data_offset = data_offset
        self.is_on_host = is_host(memory.device)
        self.directory = Directory(memory.words, first_word=_DIRECTORY_WORD, count=records)

    @classmethod
    def create(cls, memory: Memory, segment_id: bytes, *, records: int = 0) -> Segment:
        """Writes header and an empty directory (``records`` 0: one per 64 KiB) into zeroed memory.

        Raises ``CapacityError`` when the directory leaves no room for data.
        """
        count = records or default_records(memory.nbytes)
        data_offset = DIRECTORY_OFFSET + _aligned(count * RECORD_BYTES)
        if data_offset + EXTENT_ALIGNMENT > memory.nbytes:
            raise CapacityError(
                f"a segment of {format_size(memory.nbytes)} has no room for data: header and {count} records take "
                f"{approximate_size(data_offset)}; use a larger segment.size or fewer segment.records"
            )
        segment = cls(memory, segment_id=segment_id, incarnation=1, records=count, data_offset=data_offset)
        segment._write_header()
        return segment

    @classmethod
    def open(cls, memory: Memory, segment_id: bytes, incarnation: int) -> Segment:
        """The segment that another process made in this memory.

        Raises ``CorruptionError`` when it is not there in this incarnation, or not of this format.
        """
        words = memory.words.load_run(0, HEADER_WORDS).tolist()
        header = checked_header(words, segment_id, incarnation, memory.nbytes)
        return cls(
            memory,
            segment_id=segment_id,
            incarnation=incarnation,
            records=header.records,
            data_offset=header.data_offset,
        )

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    @property
    def records(self) -> int:
        return self.directory.count

    @property
    def tensor(self) -> torch.Tensor:
        """All of it as uint8 ``[nbytes]``, no copy; placements' offsets count from its beginning."""
        return self.memory.tensor

    def is_copied_by_kernels(self, device: torch.device) -> bool:
        """Whether kernels make the copies between planes on ``device`` and this segment."""
        return not self.is_on_host and self.tensor.device == device

    def begin_incarnation(self) -> None:
        """A new life for the donor's segment: every committed record is retired, the header tells others apart.

        Records that a writer is at stay, until there is evidence that it stopped.
        """
        self.retire_committed()
        self.incarnation += 1
        self._write_header()

    def retire_committed(self) -> int:
        """Retires every committed record; how many. Only the donor, while the server grants nothing here."""
        return self.directory.retire_committed()

    @property
    def directory_address(self) -> int:
        """Where record 0 begins; valid as ``Memory.address`` is."""
        return self.memory.address + DIRECTORY_OFFSET

    def mark(self, records: Sequence[int], rows: WordArray) -> list[bool]:
        return self.directory.mark(records, rows)

    def fence(self) -> None:
        """Between a payload and its commit."""
        self.memory.words.fence()

    def commit(self, records: Sequence[int], generations: Sequence[int]) -> list[bool]:
        return self.directory.commit(records, generations)

    def retire(self, record: int, generation: int) -> bool:
        return self.directory.retire(record, generation)

    def generation(self, record: int) -> int:
        return self.directory.generation(record)

    def matches(self, records: IndexArray, generations: WordArray, keys: WordArray) -> npt.NDArray[np.bool_]:
        return self.directory.matches(records, generations, keys)

    def layouts(self, records: IndexArray) -> WordArray:
        return self.directory.layouts(records)

    def scan(self) -> Iterator[RecordInfo]:
        return self.directory.scan()

    def contains(self, offset: int, nbytes: int) -> bool:
        """Whether an extent lies within the segment's data."""
        return self.data_offset <= offset and nbytes > 0 and offset + nbytes <= self.nbytes

    def check_integrity(self) -> None:
        """Raises ``CorruptionError`` when records are torn, lie outside the data, or overlap. For a segment at rest."""
        rows, whole = self.directory.rows(0, self.records)
        live = np.flatnonzero(rows[:, GENERATION])
        if not whole.all():
            raise CorruptionError(f"records {np.flatnonzero(~whole).tolist()} do not agree with their checksums")
        extents = sorted((int(rows[index, OFFSET]), int(rows[index, NBYTES]), int(index)) for index in live)
        end, before = self.data_offset, -1
        for offset, nbytes, record in extents:
            if not self.contains(offset, nbytes) or offset < end:
                raise CorruptionError(f"record {record} at {offset} overlaps record {before} or lies outside the data")
            end, before = offset + nbytes, record

    def close(self) -> None:
        """Closes the memory. Harmless when called twice."""
        self.memory.close()

    def _write_header(self) -> None:
        high, low = self.segment_id[8:], self.segment_id[:8]
        words = [
            MAGIC,
            FORMAT_VERSION,
            int.from_bytes(low, "little"),
            int.from_bytes(high, "little"),
            self.incarnation,
            self.nbytes,
            DIRECTORY_OFFSET,
            self.records,
            self.data_offset,
        ]
        store = self.memory.words.store
        store(_MAGIC, 0)
        for index, word in enumerate([*words, _checksum(words)][1:], 1):
            store(index, word)
        store(_MAGIC, MAGIC)  # last: a header with its magic is whole


class Header(NamedTuple):
    """What a header says that was not known before."""

    records: int
    data_offset: int


def checked_header(words: Sequence[int], segment_id: bytes, incarnation: int, nbytes: int) -> Header:
    """The first ``HEADER_WORDS`` of the memory in which this incarnation of this segment is expected.

    Raises ``CorruptionError`` when it is not there, or not of this format.
    """
    if words[_MAGIC] != MAGIC or words[_CHECKSUM] != _checksum(words):
        raise CorruptionError("the memory does not begin with a segment's header")
    if words[_VERSION] != FORMAT_VERSION:
        raise CorruptionError(f"the segment has format version {words[_VERSION]}, this is {FORMAT_VERSION}")
    found = words[_ID].to_bytes(8, "little") + words[_ID + 1].to_bytes(8, "little")
    if (found, words[_INCARNATION], words[_NBYTES]) != (segment_id, incarnation, nbytes):
        raise CorruptionError(
            f"expected segment {segment_id.hex()} incarnation {incarnation} of {nbytes} bytes, found "
            f"{found.hex()} incarnation {words[_INCARNATION]} of {words[_NBYTES]} bytes"
        )
    return Header(words[_RECORDS], words[_DATA])


def default_records(nbytes: int) -> int:
    """How many records a segment of ``nbytes`` has unless configured."""
    return min(MAX_RECORDS, max(MIN_RECORDS, nbytes // _BYTES_PER_RECORD))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // EXTENT_ALIGNMENT) * EXTENT_ALIGNMENT


def _checksum(words: Sequence[int]) -> int:
    return folded(MAGIC, words[:_CHECKSUM])
