"""A process with a GPU that maps a segment as it is told: ``python -m tests.memory.mapping_process RUNTIME_DIR PLACE``, a command a line.

``PLACE`` is where the segment is, "host", "vram" or "peer", which is another GPU; it is this process's own, which maps it once more, as another would (by a VMM
handle that is possible). ``use``, ``release`` (the last use), ``pinned SECONDS`` (whether the last use is, within this time), ``read``, ``drop``, ``idle SECONDS`` (a look at the clock), ``close``,
and for use in place ``adopt`` (in two of its lives) and ``give-up``: each answered by ``done`` or what it found.
"""

from __future__ import annotations

import logging
import secrets
import sys
from pathlib import Path

from vcache.memory.base import Memory
from vcache.memory.cuda import CudaMemory
from vcache.memory.cuda_driver import device_uuid
from vcache.memory.host import HostMemory
from vcache.pool.mappings import Mappings, Use
from vcache.pool.runtime_dir import RuntimeDir
from vcache.pool.segment import Segment
from vcache.protocol import SegmentInfo, Tier
from vcache.transfer_config import TransferConfig

MIB = 1 << 20


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    runtime, place = RuntimeDir(Path(sys.argv[1])), sys.argv[2]
    segment_id = secrets.token_bytes(16)
    memory: Memory
    if place == "host":
        memory = HostMemory.create(runtime, segment_id, 2 * MIB)
    else:
        device = "cuda:1" if place == "peer" else "cuda:0"
        memory = CudaMemory.create(runtime, segment_id, 2 * MIB, device=device, handles="vmm")
    segment = Segment.create(memory, segment_id)
    segment.memory.words.store(segment.data_offset // 8, 4711)
    segment.fence()
    tier = Tier.DRAM if place == "host" else Tier.VRAM
    label = ""
    info = SegmentInfo(1, segment_id, 1, tier, runtime.host_id, memory.device, memory.nbytes, memory.handle, label)
    mappings = Mappings(runtime, host=runtime.host_id, device=device_uuid(0), settings=TransferConfig(unmap_after=10.0))
    uses: list[Use] = []

    def adopt() -> None:
        mappings.adopt(segment)
        segment.begin_incarnation()
        mappings.adopt(segment)

    def give_up() -> None:
        assert mappings.give_up(segment, 60)
        segment.close()

    answerless = {
        "adopt": adopt,
        "close": mappings.close,
        "drop": lambda: mappings.drop((segment_id, 1)),
        "give-up": give_up,
        "release": lambda: uses.pop().release(),
    }
    print("ready", flush=True)
    for line in sys.stdin:
        what, *rest = line.split()
        answer = "done"
        if what == "use":
            use = mappings.use(info)
            answer = "used" if use is not None else "not to be had"
            uses += [use] if use is not None else []
        elif what == "read":
            answer = str(uses[-1].segment.memory.words.load(segment.data_offset // 8))
        elif what == "pinned":
            answer = str(uses[-1].await_pinned(float(rest[0])))
        elif what == "idle":
            mappings.unmap_idle(float(rest[0]))
            answer = str(len(mappings.mapped()))
        else:
            answerless[what]()
        print(answer, flush=True)


if __name__ == "__main__":
    main()
