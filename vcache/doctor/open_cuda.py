"""``python -m vcache.doctor.open_cuda DIRECTORY HANDLE BYTES OWNER READER``: another process's VRAM, opened as the pool would.

OWNER and READER are UUIDs of GPUs: whose memory it is, and which one is to use it. Says the word at its second place.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vcache.errors import VCacheError
from vcache.memory.cuda import CudaMemory
from vcache.pool.runtime_dir import RuntimeDir


def main() -> int:
    directory, handle, nbytes, owner, reader = sys.argv[1:]
    try:
        runtime, opaque = RuntimeDir(Path(directory)), bytes.fromhex(handle)
        memory = CudaMemory.open(runtime, opaque, int(nbytes), device=owner, reader=reader)
        print(memory.words.load(1))
    except VCacheError as error:
        print(error, file=sys.stderr)
        return 1
    memory.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
