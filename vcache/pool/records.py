"""The directory of a segment: 128-byte records that describe its payloads, marked, committed, retired and validated.

``docs/segment-format.md`` has the layout and why it is safe. In short: a record's generation, its last word, is 0 when the
record is free, odd while a writer is at work, even once committed. Generations come from the metadata server and never
repeat, so one equal word *after* a copy proves that the bytes copied belong to the entry that was looked up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from vcache.memory.base import IndexArray, WordArray, Words
from vcache.protocol import KEY_BYTES, RecordInfo

RECORD_BYTES: Final = 128
RECORD_WORDS: Final = RECORD_BYTES // 8

# Words of a record. 12 and 13 are reserved (0).
KEY: Final = 0  # and 1
PARENT: Final = 2  # and 3; 0 = none
TENANT: Final = 4
OFFSET: Final = 5
NBYTES: Final = 6
SHAPE: Final = 7  # tokens (32 bits), rank (16), ranks (16), from the lowest bit on
CODEC: Final = 8  # codec (32 bits; 0 = plain), time to live in seconds (32)
PAYLOAD_CHECKSUM: Final = 9  # 0 = none; outside CHECKSUM, since it is known only after the payload
EXPIRES: Final = 10  # unix seconds; 0 = never
LAYOUT: Final = 11  # ``PagedKV.payload_layout`` of the planes it was gathered from; 0 = not said
CHECKSUM: Final = 14  # over 0-8, 10-13 and the even generation: a commit then changes one word only
GENERATION: Final = 15

_COVERED: Final = (*range(PAYLOAD_CHECKSUM), *range(PAYLOAD_CHECKSUM + 1, CHECKSUM))
SEED: Final = 0x9E3779B97F4A7C15
FACTOR: Final = 0xFF51AFD7ED558CCD
_SEED: Final = np.uint64(SEED)
_FACTOR: Final = np.uint64(FACTOR)
_MASK: Final = (1 << 64) - 1
#: Up to so many records numbers of Python are faster than some sixty operations on arrays.
_FEW: Final = 8
_HALF: Final = np.uint64(32)
_ONE: Final = np.uint64(1)
#: How often a scan re-reads a record that changes under it before it takes it for one that a writer is at.
_SETTLE_TRIES: Final = 16
_SCAN_RECORDS: Final = 4096


@dataclass(frozen=True, slots=True)
class RunFields:
    """What the records of one run of chunks have in common."""

    tenant: int
    rank: int
    ranks: int
    tokens: int
    ttl_s: int = 0
    expires_s: int = 0
    codec: int = 0
    layout: int = 0


def even(generation: int) -> int:
    """The committed form of a generation in either form."""
    return (generation + 1) & ~1


def key_words(keys: bytes) -> WordArray:
    """16-byte keys, one after the other, as ``[n, 2]`` words."""
    return np.frombuffer(keys, dtype="<u8").reshape(-1, KEY_BYTES // 8)


def folded(seed: int, words: Iterable[int]) -> int:
    """One checksum over words, from ``seed`` on."""
    state = seed
    for word in words:
        state = (state ^ word) * FACTOR & _MASK
        state ^= state >> 32
    return state


def pack(
    run: RunFields,
    *,
    keys: WordArray,
    parents: WordArray,
    offsets: WordArray,
    nbytes: WordArray,
    generations: WordArray,
) -> WordArray:
    """Records as ``[n, 16]`` words in their committed form. ``keys`` and ``parents`` are ``[n, 2]``, the others ``[n]``."""
    rows: WordArray = np.zeros((len(keys), RECORD_WORDS), dtype=np.uint64)
    rows[:, KEY : KEY + 2] = keys
    rows[:, PARENT : PARENT + 2] = parents
    rows[:, TENANT] = run.tenant
    rows[:, OFFSET] = offsets
    rows[:, NBYTES] = nbytes
    rows[:, SHAPE] = run.tokens | run.rank << 32 | run.ranks << 48
    rows[:, CODEC] = run.codec | run.ttl_s << 32
    rows[:, EXPIRES] = run.expires_s
    rows[:, LAYOUT] = run.layout
    rows[:, GENERATION] = generations
    rows[:, CHECKSUM] = checksums(rows)
    return rows


def checksums(rows: WordArray) -> WordArray:
    """The checksum that each row ``[n, 16]`` should hold. Multiply and fold, as in MurmurHash3's finaliser."""
    if len(rows) <= _FEW:
        covered = ([*(row[column] for column in _COVERED), even(row[GENERATION])] for row in rows.tolist())
        return np.array([folded(SEED, words) for words in covered], dtype=np.uint64)
    state: WordArray = np.full(len(rows), _SEED, dtype=np.uint64)
    for column in _COVERED:
        state = (state ^ rows[:, column]) * _FACTOR
        state ^= state >> _HALF
    state = (state ^ ((rows[:, GENERATION] + _ONE) & ~_ONE)) * _FACTOR
    return state ^ (state >> _HALF)


class Directory:
    """The records of one segment, as words of its memory from ``first_word`` on.

    Nothing here waits or locks. Who may call what is the protocol's business: ``mark`` and ``commit`` only the writer that
    was granted the record, ``retire`` only the donor; ``matches`` and ``scan`` anybody.
    """

    def __init__(self, words: Words, *, first_word: int, count: int) -> None:
        self._words = words
        self._first = first_word
        self.count = count

    def mark(self, records: Sequence[int], rows: WordArray) -> list[bool]:
        """Says in memory that a writer is at the records: each row of ``rows`` as ``pack`` made it, then its odd
        generation.

        False, and nothing changed, for one that is not free: then something is wrong with the grant.
        """
        words = self._words
        marked = []
        for record, row in zip(records, rows, strict=True):
            base = self._word(record)
            is_free = not words.load(base + GENERATION)
            if is_free:
                words.store_run(base, row[:GENERATION])
                words.store(base + GENERATION, int(row[GENERATION]) - 1)
            marked.append(is_free)
        return marked

    def commit(self, records: Sequence[int], generations: Sequence[int]) -> list[bool]:
        """Turns the records valid, each in one store. The caller has fenced their payloads (``Words.fence``) before.

        False, and nothing changed, for one that is no longer this writer's.
        """
        words = self._words
        committed = []
        for record, generation in zip(records, generations, strict=True):
            word = self._word(record) + GENERATION
            is_ours = words.load(word) == generation - 1
            if is_ours:
                words.store(word, generation)
            committed.append(is_ours)
        return committed

    def retire(self, record: int, generation: int) -> bool:
        """Frees the record if it still holds this generation, in either form; whether it did."""
        word = self._word(record) + GENERATION
        held = self._words.load(word)
        if not held or even(held) != even(generation):
            return False
        self._words.store(word, 0)
        return True

    def retire_committed(self) -> int:
        """Frees every record that is committed, and leaves those that a writer is at; how many."""
        retired = 0
        for start in range(0, self.count, _SCAN_RECORDS):
            records = np.arange(start, min(start + _SCAN_RECORDS, self.count))
            held = self._words.load_each(self._first + records * RECORD_WORDS + GENERATION)
            for index in np.flatnonzero((held != 0) & (held & _ONE == 0)).tolist():
                retired += self.retire(start + index, int(held[index]))
        return retired

    def generation(self, record: int) -> int:
        """0 free, odd while a writer is at work, even once committed."""
        return self._words.load(self._word(record) + GENERATION)

    def matches(self, records: IndexArray, generations: WordArray, keys: WordArray) -> npt.NDArray[np.bool_]:
        """Which records hold exactly this (even) generation and key ``[n, 2]``. To be asked *after* a copy.

        True means that every byte copied before the call was of that entry.
        """
        if len(records) == 1:  # a tenth of the time, on a host
            row = self._words.load_run(self._first + int(records[0]) * RECORD_WORDS, RECORD_WORDS).tolist()
            is_valid = [row[GENERATION], row[KEY], row[KEY + 1]] == [int(generations[0]), *keys[0].tolist()]
            return np.array([is_valid])
        base = self._first + records * RECORD_WORDS
        held = self._words.load_each(base[:, None] + np.array([KEY, KEY + 1, GENERATION]))
        valid: npt.NDArray[np.bool_] = (held[:, 2] == generations) & (held[:, :2] == keys).all(axis=1)
        return valid

    def layouts(self, records: IndexArray) -> WordArray:
        """The layout word of each record: that of an entry which ``matches`` proves to have been there all the while."""
        if len(records) == 1:
            return np.array([self._words.load(self._word(int(records[0])) + LAYOUT)], dtype=np.uint64)
        return self._words.load_each(self._first + records * RECORD_WORDS + LAYOUT)

    def rows(self, start: int, count: int) -> tuple[WordArray, npt.NDArray[np.bool_]]:
        """Records as ``[count, 16]`` words, and which of them are whole: free, or with a checksum that agrees.

        A record that changes meanwhile is read again, a few times.
        """
        base = self._word(start)
        rows = self._words.load_run(base, count * RECORD_WORDS).reshape(count, RECORD_WORDS)
        whole = _whole(rows)
        for _ in range(_SETTLE_TRIES):
            unsettled = np.flatnonzero(~whole)
            if not unsettled.size:
                break
            for record in unsettled.tolist():
                rows[record] = self._words.load_run(base + record * RECORD_WORDS, RECORD_WORDS)
            whole[unsettled] = _whole(rows[unsettled])
        return rows, whole

    def scan(self) -> Iterator[RecordInfo]:
        """All records that are not free, each as of one instant during the scan.

        One that never settles comes as a writer's (odd generation) with nothing in it, so that its space is given to nobody.
        """
        for start in range(0, self.count, _SCAN_RECORDS):
            rows, whole = self.rows(start, min(_SCAN_RECORDS, self.count - start))
            for index in np.flatnonzero(rows[:, GENERATION]).tolist():
                yield info_of(start + index, rows[index]) if whole[index] else _unsettled(start + index, rows[index])

    def _word(self, record: int) -> int:
        if not 0 <= record < self.count:
            raise IndexError(f"record {record}: the directory has {self.count}")
        return self._first + record * RECORD_WORDS


def hold(rows: WordArray, generations: WordArray, keys: WordArray) -> npt.NDArray[np.bool_]:
    """Which records, read ``[n, 16]`` as they were at some time after a copy, hold this (even) generation and key ``[n, 2]``.

    As ``Directory.matches``, for a copy of the records whose words may be torn: the checksum covers key and generation.
    """
    held: npt.NDArray[np.bool_] = (
        (rows[:, GENERATION] == generations)
        & (rows[:, KEY : KEY + 2] == keys).all(axis=1)
        & (checksums(rows) == rows[:, CHECKSUM])
    )
    return held


def _whole(rows: WordArray) -> npt.NDArray[np.bool_]:
    whole: npt.NDArray[np.bool_] = (rows[:, GENERATION] == 0) | (checksums(rows) == rows[:, CHECKSUM])
    return whole


def info_of(record: int, row: WordArray) -> RecordInfo:
    """A whole row ``[16]`` as it is handed over."""
    words = row.tolist()
    parent = row[PARENT : PARENT + 2].tobytes() if words[PARENT] or words[PARENT + 1] else b""
    return RecordInfo(
        record=record,
        generation=words[GENERATION],
        key=row[KEY : KEY + 2].tobytes(),
        parent=parent,
        rank=words[SHAPE] >> 32 & 0xFFFF,
        ranks=words[SHAPE] >> 48,
        tenant=words[TENANT],
        offset=words[OFFSET],
        nbytes=words[NBYTES],
        tokens=words[SHAPE] & 0xFFFF_FFFF,
        expires_s=words[EXPIRES],
    )


def _unsettled(record: int, row: WordArray) -> RecordInfo:
    return RecordInfo(
        record=record,
        generation=even(int(row[GENERATION])) - 1,
        key=bytes(KEY_BYTES),
        parent=b"",
        rank=0,
        ranks=1,
        tenant=0,
        offset=0,
        nbytes=0,
        tokens=0,
        expires_s=0,
    )
