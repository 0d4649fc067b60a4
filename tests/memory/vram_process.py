"""A process that makes and opens VRAM as it is told: ``python -m tests.memory.vram_process RUNTIME_DIR``, a command a line.

    create KIND DEVICE NBYTES     made HANDLE UUID              open HANDLE NBYTES UUID READER    opened
    store WORD VALUE | close      done                          load WORD                         word VALUE
    counts                        holds DESCRIPTORS THREADS     modules                           modules with|without torch
    fail CALL                     done: the stand-in refuses that call from now on

or ``refused ERROR: TEXT``. One memory at a time.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
import threading
from pathlib import Path
from typing import cast

from vcache.errors import VCacheError
from vcache.memory.cuda import CudaMemory, HandleKind
from vcache.pool.runtime_dir import RuntimeDir


def main() -> None:
    logging.basicConfig()
    runtime = RuntimeDir(Path(sys.argv[1]))
    memory: CudaMemory | None = None
    for line in sys.stdin:
        what, *rest = line.split()
        try:
            if what == "create":
                kind, device, nbytes = rest
                handles, segment_id = cast("HandleKind", kind), secrets.token_bytes(16)
                memory = CudaMemory.create(runtime, segment_id, int(nbytes), device=device, handles=handles)
                print("made", memory.handle.hex(), memory.device)
            elif what == "open":
                handle, nbytes, device, reader = rest
                memory = CudaMemory.open(runtime, bytes.fromhex(handle), int(nbytes), device=device, reader=reader)
                print("opened")
            elif what == "counts":
                print("holds", len(os.listdir("/proc/self/fd")), threading.active_count())
            elif what == "fail":
                os.environ["STAND_IN_FAIL"] = rest[0]
                print("done")
            elif what == "modules":
                print("modules", "with" if "torch" in sys.modules else "without", "torch")
            elif memory is None:
                print("refused: there is no memory")
            elif what == "store":
                memory.words.store(*map(int, rest))
                memory.words.fence()
                print("done")
            elif what == "load":
                print("word", memory.words.load(int(rest[0])))
            elif what == "close":
                memory.close()
                memory.close()
                print("done")
        except VCacheError as error:
            print(f"refused {type(error).__name__}: {error}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
