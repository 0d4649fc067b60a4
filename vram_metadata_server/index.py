"""The index: chunk keys to their entries, an entry's shards, and which chunks have children.

An entry lives in exactly one of two dictionaries: ``whole`` (every rank's shard is there: a hit) or ``partial``. A lookup is
then one dictionary access per key. Nothing here knows of leases, donors or space; placements are taken out by
``catalog.py``, which also sees to it that their records are retired.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter
from struct import Struct as Packer
from typing import TYPE_CHECKING, Final

import msgspec

from vcache.protocol import KEY_BYTES, PLACEMENT, ErrorCode, Tier
from vram_metadata_server.refusal import RefusalError

if TYPE_CHECKING:
    from vram_metadata_server.segments import Segment

_GENERATION_AT: Final = 8
_KEYS_AT_ONCE: Final = 512
_unpackers: Final = [Packer(f"{KEY_BYTES}s" * count) for count in range(_KEYS_AT_ONCE + 1)]


def split_keys(blob: bytes) -> Sequence[bytes]:
    """The keys of a blob, in order. Raises ``RefusalError`` when it is not a whole number of keys."""
    count, rest = divmod(len(blob), KEY_BYTES)
    if rest:
        text = f"keys: {len(blob)} bytes are not a whole number of {KEY_BYTES}-byte keys"
        raise RefusalError(ErrorCode.BAD_REQUEST, text)
    if count <= _KEYS_AT_ONCE:
        return _unpackers[count].unpack(blob)
    return [blob[at : at + KEY_BYTES] for at in range(0, len(blob), KEY_BYTES)]


# A million of each of these two may be alive: no garbage-collector header (gc=False), and nothing that can be derived.
# They refer to each other; taking a placement out of its entry breaks the circle.


class Placement(msgspec.Struct, gc=False, eq=False):
    """One committed copy of a shard. ``packed`` is what readers are sent (``protocol.PLACEMENT``)."""

    entry: Entry
    segment: Segment
    rank: int
    packed: bytes
    next: Placement | None = None  # another copy of the same shard

    @property
    def record(self) -> int:
        return int.from_bytes(self.packed[4:_GENERATION_AT], "little")

    @property
    def generation(self) -> int:
        return int.from_bytes(self.packed[_GENERATION_AT : _GENERATION_AT + 8], "little")

    @property
    def extent(self) -> tuple[int, int]:
        """Offset and nbytes."""
        _, _, _, offset, nbytes = PLACEMENT.unpack(self.packed)
        return offset, nbytes

    @property
    def may_go(self) -> bool:
        """Whether no other chunk needs it as its forerunner: its entry is a leaf, or one in VRAM, or has this shard twice."""
        entry = self.entry
        leaving = entry.leaving
        if entry.children <= leaving:
            return True
        if entry.in_vram and entry.vram_children <= leaving and self.segment.info.tier is Tier.VRAM:
            return True
        first = entry.shards[self.rank]
        return first is not None and first.next is not None


class Entry(msgspec.Struct, gc=False, eq=False):
    """A chunk: its shards by rank, each a chain of placements (``Placement.next``)."""

    key: bytes
    parent: bytes
    tenant: int
    shards: tuple[Placement | None, ...]
    missing: int  # ranks without a placement; 0 = whole
    children: int  # entries and live reservations whose parent this is; 0 = a leaf
    vram_children: int = 0  # entries whose parent this is that have a placement in VRAM; 0 = a leaf among what is there
    in_vram: int = 0  # placements in VRAM, of all ranks
    leaving: int = 0  # children that are being demoted
    holds: int = 0  # leases and pins: not a victim while there are any
    touched: int = 0  # the eviction policy's notion of time
    packed: bytes = b""  # of rank 0's only placement: what most acquires want, three cache misses nearer
    child: Entry | None = None  # the last of the children that came after this: a guess at what follows in a prompt

    def placements(self) -> Iterator[Placement]:
        for first in self.shards:
            placement = first
            while placement is not None:
                following = placement.next  # the caller may take this one out
                yield placement
                placement = following


_NO_ENTRY: Final = Entry(b"", b"", 0, (), 0, 0)


class Index:
    """All entries of the term."""

    def __init__(self) -> None:
        #: Where to note what became of keys that are whole, or were, for whoever empties it: ``Entry.packed``, or None.
        self.changes: dict[bytes, bytes | None] | None = None
        self.whole: dict[bytes, Entry] = {}
        self.partial: dict[bytes, Entry] = {}
        #: Children of chunks that have no entry (yet, or any more).
        self.orphans: dict[bytes, int] = {}
        self.vram_orphans: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self.whole) + len(self.partial)

    def get(self, key: bytes) -> Entry | None:
        return self.whole.get(key) or self.partial.get(key)

    def run(self, keys: Sequence[bytes]) -> list[Entry]:
        """The entries of the leading run of whole chunks."""
        found: list[Entry] = []
        before = _NO_ENTRY
        for key in keys:
            # What came together lies together in memory; the places of its keys in the dictionary do not, and each is
            # two cache misses where there are many.
            entry = before.child
            if entry is None or entry.key != key or entry.missing:
                entry = self.whole.get(key)
                if entry is None:
                    break
            found.append(entry)
            before = entry
        return found

    def count(self, keys: Sequence[bytes]) -> int:
        """The length of the leading run of whole chunks, without a look at the entries themselves."""
        if not keys:
            return 0
        try:
            itemgetter(*keys)(self.whole)  # the whole loop in C: a third faster than all(map(...))
        except KeyError:
            return list(map(self.whole.__contains__, keys)).index(False)
        return len(keys)

    def create(self, key: bytes, parent: bytes, tenant: int, ranks: int) -> Entry:
        """A new entry without placements; the caller adds the first at once. It becomes its parent's child."""
        above = self.get(parent)
        if above is not None:
            parent = above.key  # one object for all children
        children, vram_children = self.orphans.pop(key, 0), self.vram_orphans.pop(key, 0)
        entry = Entry(key, parent, tenant, (None,) * ranks, ranks, children, vram_children)
        self.partial[key] = entry
        if above is not None:
            above.child = entry
        self.add_child(parent)
        return entry

    def add(self, entry: Entry, segment: Segment, rank: int, packed: bytes) -> Placement:
        """One more placement of the entry's shard of ``rank``."""
        first = entry.shards[rank]
        placement = Placement(entry, segment, rank, packed, first)
        self._replace(entry, rank, placement)
        if segment.info.tier is Tier.VRAM:
            entry.in_vram += 1
            if entry.in_vram == 1:
                self._add_vram_child(entry.parent)
        if first is None:
            entry.missing -= 1
            if entry.missing == 0:
                self.whole[entry.key] = self.partial.pop(entry.key)
        if self.changes is not None and not entry.missing:
            self.changes[entry.key] = entry.packed
        return placement

    def discard(self, placement: Placement) -> Entry | None:
        """Takes a placement out; with its last one the entry goes too.

        Answers the parent that thereby became a leaf, in VRAM or altogether.
        """
        entry, rank = placement.entry, placement.rank
        vram_leaf: Entry | None = None
        if placement.segment.info.tier is Tier.VRAM:
            entry.in_vram -= 1
            if not entry.in_vram:
                vram_leaf = self._drop_vram_child(entry.parent)
        chain = [other for other in copies_of(entry.shards[rank]) if other is not placement]
        first: Placement | None = None
        for other in reversed(chain):
            other.next, first = first, other
        placement.next = None
        self._replace(entry, rank, first)
        if self.changes is not None and not entry.missing:
            self.changes[entry.key] = entry.packed if first is not None else None
        if first is not None:
            return vram_leaf
        if entry.missing == 0:
            self.partial[entry.key] = self.whole.pop(entry.key)
        entry.missing += 1
        if entry.missing < len(entry.shards):
            return vram_leaf
        del self.partial[entry.key]
        self._forget_child(entry)
        if entry.children:
            self.orphans[entry.key] = entry.children
        if entry.vram_children:
            self.vram_orphans[entry.key] = entry.vram_children
        return self.drop_child(entry.parent) or vram_leaf

    def _replace(self, entry: Entry, rank: int, first: Placement | None) -> None:
        entry.shards = (*entry.shards[:rank], first, *entry.shards[rank + 1 :])
        if rank == 0:
            entry.packed = b"" if first is None or first.next is not None else first.packed

    def add_child(self, parent: bytes) -> None:
        if not parent:
            return
        above = self.get(parent)
        if above is not None:
            above.children += 1
        else:
            self.orphans[parent] = self.orphans.get(parent, 0) + 1

    def drop_child(self, parent: bytes) -> Entry | None:
        """One child less; answers the parent if it thereby became a leaf."""
        if not parent:
            return None
        above = self.get(parent)
        if above is not None:
            above.children -= 1
            return None if above.children else above
        _count_down(self.orphans, parent)
        return None

    def _forget_child(self, entry: Entry) -> None:
        """Nothing leads to the entry any more, nor from it to others that have gone."""
        above = self.get(entry.parent)
        if above is not None and above.child is entry:
            above.child = None
        entry.child = None

    def _add_vram_child(self, parent: bytes) -> None:
        if not parent:
            return
        above = self.get(parent)
        if above is not None:
            above.vram_children += 1
        else:
            self.vram_orphans[parent] = self.vram_orphans.get(parent, 0) + 1

    def _drop_vram_child(self, parent: bytes) -> Entry | None:
        if not parent:
            return None
        above = self.get(parent)
        if above is not None:
            above.vram_children -= 1
            return None if above.vram_children else above
        _count_down(self.vram_orphans, parent)
        return None


def _count_down(counts: dict[bytes, int], name: bytes) -> None:
    left = counts[name] - 1
    if left:
        counts[name] = left
    else:
        del counts[name]


def copies_of(first: Placement | None) -> Iterator[Placement]:
    """All placements of a shard, by the first of them."""
    while first is not None:
        yield first
        first = first.next
