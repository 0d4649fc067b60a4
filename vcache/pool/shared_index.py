"""The server's index in shared memory: its file's layout, and the functions on it (``shared_index.c``).

docs/index-format.md has the layout byte by byte. The server writes it (``vram_metadata_server/published.py``), clients of its
host read it (``index_reader.py``). No numpy here: the server uses this module.
"""

from __future__ import annotations

import ctypes
import struct
from enum import IntEnum
from typing import Final

from vcache.native import native_library

FORMAT_VERSION: Final = 2
MAGIC: Final = b"VCACHIDX"
#: Magic, version, term, slots, state.
HEADER: Final = struct.Struct("<8sQQQQ")
HEADER_BYTES: Final = 64
SLOT_BYTES: Final = 64


class State(IntEnum):
    """What a reader may do with a table."""

    CLOSED = 0  # nothing: it is being filled, or its server has given it up
    LIVE = 1  # ask it
    SUSPENDED = 2  # ask the server: the table has keys that a lookup there would not find
    SUPERSEDED = 3  # open the file of the same name: a table of another size has taken its place


#: What ``index_run`` answers where placements are asked for, and the server is to be asked for one: there are several, say.
NOT_PLACED: Final = -17


def state_answer(state: State) -> int:
    """What ``index_run`` answers for a table in a state other than live."""
    return -1 - state


def index_bytes(slots: int) -> int:
    """The size of a table's file."""
    return HEADER_BYTES + slots * SLOT_BYTES


class Counts(ctypes.Structure):
    """What the writer alone knows of its table: keys present, and slots in use by these and by removed ones."""

    _fields_ = (("present", ctypes.c_int64), ("used", ctypes.c_int64))


_library = native_library("vcache.pool._shared_index")
_ADDRESS, _NUMBER, _BYTES = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
_COUNTS = ctypes.POINTER(Counts)

#: (table, slots, limit, counts, keys, placements, whether each is present, how many) -> how many were done before it was full.
index_apply = _library.vcache_index_apply
index_apply.argtypes = [_ADDRESS, _NUMBER, _NUMBER, _COUNTS, _BYTES, _BYTES, _BYTES, _NUMBER]
index_apply.restype = _NUMBER
#: (from, its first slot, the one to end before, to, its slots, limit, counts) -> before which slot the latter was full.
index_copy = _library.vcache_index_copy
index_copy.argtypes = [_ADDRESS, _NUMBER, _NUMBER, _ADDRESS, _NUMBER, _NUMBER, _COUNTS]
index_copy.restype = _NUMBER
#: (table, state)
index_set_state = _library.vcache_index_set_state
index_set_state.argtypes = [_ADDRESS, ctypes.c_uint64]
index_set_state.restype = None
#: (table, slots, descriptor, keys, how many, buffer for placements or None) -> the length of the leading run present, or a
#: negative ``state_answer``.
index_run = _library.vcache_index_run
index_run.argtypes = [_ADDRESS, _NUMBER, ctypes.c_int, _BYTES, _NUMBER, _BYTES]
index_run.restype = _NUMBER
