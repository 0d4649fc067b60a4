"""``python -m vcache.doctor.open_cuda HANDLE BYTES DEVICE``: opens another process's VRAM and says the word at its second place."""

from __future__ import annotations

import sys

from vcache.memory.cuda import CudaMemory


def main() -> None:
    handle, nbytes, device = sys.argv[1:]
    memory = CudaMemory.open(bytes.fromhex(handle), int(nbytes), device=device)
    print(memory.words.load(1))
    memory.close()


if __name__ == "__main__":
    main()
