"""VRAM that another process owns, opened here: ``python -m benchmarks.gpu_segment DIRECTORY DEVICE BYTES`` is that process."""

from __future__ import annotations

import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vcache.memory.cuda import CudaMemory
from vcache.pool.runtime_dir import RuntimeDir


@contextmanager
def segment_of_another_process(nbytes: int, *, device: str) -> Iterator[torch.Tensor]:
    """uint8 ``[nbytes]`` on ``device``. The owner ends afterwards."""
    with tempfile.TemporaryDirectory(prefix="vcache-benchmark-") as directory:
        command = [sys.executable, "-m", "benchmarks.gpu_segment", directory, device, str(nbytes)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
            assert owner.stdin is not None and owner.stdout is not None
            try:
                handle, uuid = owner.stdout.readline().split()
                memory = CudaMemory.open(RuntimeDir(Path(directory)), bytes.fromhex(handle), nbytes, device=uuid)
                try:
                    yield memory.tensor
                finally:
                    torch.cuda.synchronize(device)  # nothing may be using what is unmapped
                    memory.close()
            finally:
                owner.stdin.close()  # it ends


def main() -> None:
    directory, device, nbytes = sys.argv[1:]
    memory = CudaMemory.create(RuntimeDir(Path(directory)), secrets.token_bytes(16), int(nbytes), device=device)
    print(memory.handle.hex(), memory.device, flush=True)
    sys.stdin.read()
    memory.close()


if __name__ == "__main__":
    main()
