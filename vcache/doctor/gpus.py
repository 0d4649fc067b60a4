"""The GPUs: the driver, which of them this process sees, and between which of them memory can be shared.

Of each pair what the driver promises; of each device what really happens, by a second process that opens memory of this one.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Generator, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any, Final

from vcache.doctor.finding import Finding, State
from vcache.errors import CapacityError, UnavailableError
from vcache.units import approximate_size

DRIVER: Final = Path("/proc/driver/nvidia")
PROBE_BYTES: Final = 1 << 20
#: A bare CUDA context of one process, about; a serving engine's libraries take more.
CONTEXT_BYTES: Final = 500 << 20


def examine(*, timeout_s: float) -> Iterator[Finding]:
    import torch

    if torch.version.cuda is None:
        yield Finding("GPUs", State.OK, f"torch {torch.__version__} is built without CUDA: segments are in host memory")
        return
    yield from _visible(torch)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return
    runtime = yield from _cupy(torch)
    for ordinal in range(count):
        yield _device(torch, ordinal)
    if runtime is None:
        return
    for ordinal in range(count):
        yield _shared(ordinal, timeout_s)
    for reader, owner in permutations(range(count), 2):
        yield _peers(runtime, reader, owner)


def _visible(torch: Any) -> Iterator[Finding]:
    """The driver, and GPUs that it has and this process does not see."""
    version = DRIVER / "version"
    if not version.exists():
        yield Finding(
            "driver",
            State.PROBLEM,
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, but no NVIDIA driver is loaded here",
            "in a container, start it with access to the GPUs (--gpus all)",
        )
        return
    yield Finding("driver", State.OK, version.read_text().splitlines()[0].strip())
    there = len(list((DRIVER / "gpus").iterdir())) if (DRIVER / "gpus").is_dir() else 0
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen < there:
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        cause = (
            f"CUDA_VISIBLE_DEVICES is {chosen!r}" if chosen is not None else "the container or the driver hides them"
        )
        yield Finding(
            "hidden GPUs",
            State.NOTE if seen else State.PROBLEM,
            f"the driver has {there}, this process sees {seen}: {cause}",
            "a process can neither donate nor read the memory of a GPU that it does not see",
        )
    if os.environ.get("CUDA_MPS_PIPE_DIRECTORY"):
        yield Finding("MPS", State.NOTE, "CUDA MPS is on: a fault of one of its clients ends all of them")


def _cupy(torch: Any) -> Generator[Finding, None, Any]:
    """Yields what is to be said of CuPy, answers its runtime, or None when there is none that fits."""
    wanted = torch.version.cuda.partition(".")[0]
    try:
        from cupy.cuda import runtime
    except ImportError as error:
        yield Finding("CuPy", State.PROBLEM, f"VRAM segments need it: {error}", f"pip install vcache[cuda{wanted}]")
        return None
    built = runtime.runtimeGetVersion() // 1000
    if str(built) != wanted:
        yield Finding(
            "CuPy",
            State.NOTE,
            f"it is built for CUDA {built}, torch for CUDA {wanted}",
            f"pip install vcache[cuda{wanted}] if segments cannot be made",
        )
    return runtime


def _device(torch: Any, ordinal: int) -> Finding:
    name = torch.cuda.get_device_name(ordinal)
    free, total = torch.cuda.mem_get_info(ordinal)
    detail = (
        f"{name}, {torch.cuda.get_device_properties(ordinal).uuid}: {approximate_size(free)} of {approximate_size(total)} are "
        f"free; each process that uses it takes about {approximate_size(CONTEXT_BYTES)} besides its segments"
    )
    if "MIG" in name:
        return Finding(
            f"cuda:{ordinal}", State.NOTE, detail, "this is a MIG instance: memory is not shared between instances"
        )
    return Finding(f"cuda:{ordinal}", State.OK, detail)


def _shared(ordinal: int, timeout_s: float) -> Finding:
    """Whether another process of this host can open memory of this one, and reads the bytes that are in it."""
    about = f"CUDA IPC on cuda:{ordinal}"
    from vcache.memory.cuda import CudaMemory

    try:
        memory = CudaMemory.create(PROBE_BYTES, device=f"cuda:{ordinal}")
    except (CapacityError, UnavailableError) as error:
        return Finding(about, State.PROBLEM, str(error))
    try:
        word = secrets.randbits(63)
        memory.words.store(1, word)
        memory.words.fence()
        command = [
            sys.executable,
            "-m",
            "vcache.doctor.open_cuda",
            memory.handle.hex(),
            str(memory.nbytes),
            memory.device,
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s + 60, check=False)
        except subprocess.TimeoutExpired as error:
            return Finding(about, State.PROBLEM, str(error))
        if done.returncode or done.stdout.strip() != str(word):
            said = (done.stderr.strip().splitlines() or ["it read other bytes"])[-1]
            return Finding(
                about,
                State.PROBLEM,
                f"another process cannot read this one's memory: {said}",
                "in containers, use --ipc=host",
            )
        return Finding(about, State.OK, "another process reads this one's memory")
    finally:
        memory.close()


def _peers(runtime: Any, reader: int, owner: int) -> Finding:
    about = f"cuda:{reader} from cuda:{owner}"
    if runtime.deviceCanAccessPeer(reader, owner):
        return Finding(about, State.OK, "reads its memory directly")
    return Finding(about, State.NOTE, "no peer access: copies between them go through host memory")
