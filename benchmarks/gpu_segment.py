"""VRAM that another process owns, opened here: ``python -m benchmarks.gpu_segment DEVICE BYTES`` is that process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vcache.memory.cuda import CudaMemory


@contextmanager
def segment_of_another_process(nbytes: int, *, device: str) -> Iterator[torch.Tensor]:
    """uint8 ``[nbytes]`` on ``device``. The owner ends afterwards."""
    command = [sys.executable, "-m", "benchmarks.gpu_segment", device, str(nbytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdin is not None and owner.stdout is not None
        try:
            handle, uuid = owner.stdout.readline().split()
            memory = CudaMemory.open(bytes.fromhex(handle), nbytes, device=uuid)
            try:
                yield memory.tensor
            finally:
                memory.close()
        finally:
            owner.stdin.close()  # it ends


def main() -> None:
    device, nbytes = sys.argv[1:]
    memory = CudaMemory.create(int(nbytes), device=device)
    print(memory.handle.hex(), memory.device, flush=True)
    sys.stdin.read()
    memory.close()


if __name__ == "__main__":
    main()
