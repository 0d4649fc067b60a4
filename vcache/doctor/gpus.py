"""The GPUs: the driver, which of them this process sees, and between which of them memory can be shared, by which handles."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vcache.doctor.finding import Finding, State
from vcache.errors import CapacityError, ConfigError, UnavailableError
from vcache.pool.runtime_dir import RuntimeDir
from vcache.units import approximate_size

if TYPE_CHECKING:
    from vcache.config import VCacheConfig
    from vcache.memory.cuda import HandleKind

DRIVER: Final = Path("/proc/driver/nvidia")
PCI_DEVICES: Final = Path("/sys/bus/pci/devices")
PCI_VENDOR: Final = "0x10de"
PROBE_BYTES: Final = 1 << 20
#: A bare CUDA context of one process, about; a serving engine's libraries take more.
CONTEXT_BYTES: Final = 500 << 20


class Kind(NamedTuple):
    """A kind of handle: what people call it, and what may help where it does not work."""

    name: str
    fix: str


#: The preferred one first.
KINDS: Final[dict[HandleKind, Kind]] = {
    "vmm": Kind(
        "VMM handles",
        "in containers, give all of them the same runtime_dir (one volume) and the same user; set segment.cuda_handles: ipc to do "
        "without",
    ),
    "ipc": Kind("CUDA IPC", "in containers, start all of them with --ipc=host; between MIG instances there is none"),
}


def examine(config: VCacheConfig, *, timeout_s: float) -> Iterator[Finding]:
    import torch

    if torch.version.cuda is None:
        yield Finding("GPUs", State.OK, f"torch {torch.__version__} is built without CUDA: segments are in host memory")
        return
    yield from _visible(torch)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return
    for ordinal in range(count):
        yield _device(torch, ordinal, config.segment.size)
    missing = _driver(torch)
    if missing is not None:
        yield missing
    else:
        yield from sharing(config, timeout_s=timeout_s)
        yield pinning(config)


def _visible(torch: Any) -> Iterator[Finding]:
    """The driver, and GPUs that it has and this process does not see."""
    version = DRIVER / "version"
    if not version.exists() and torch.cuda.is_available():  # a sandbox that passes the driver's calls on
        yield Finding("driver", State.OK, f"it is there, and does not say its version in {version}")
        return
    if not version.exists() and not _has_hardware():  # torch is built for CUDA unless asked for otherwise
        yield Finding("GPUs", State.NOTE, "there is no NVIDIA GPU in this machine: segments are in host memory")
        return
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


def _has_hardware() -> bool:
    """Whether the system lists a device of NVIDIA's, whatever drives it."""
    return any(PCI_VENDOR in vendor.read_text() for vendor in PCI_DEVICES.glob("*/vendor"))


def _driver(torch: Any) -> Finding | None:
    """What keeps segments from VRAM at all, if anything does."""
    from vcache.memory.cuda_driver import driver

    try:
        driver()
    except UnavailableError as error:
        wanted = torch.version.cuda.partition(".")[0]
        return Finding("CUDA bindings", State.PROBLEM, str(error), f"pip install '.[cuda{wanted}]'")
    return None


def _device(torch: Any, ordinal: int, segment_bytes: int) -> Finding:
    """What it is and has free, and what of that a donor would take."""
    name = torch.cuda.get_device_name(ordinal)
    free, total = torch.cuda.mem_get_info(ordinal)
    detail = (
        f"{name}, {torch.cuda.get_device_properties(ordinal).uuid}: {approximate_size(free)} of {approximate_size(total)} are "
        f"free; each process that uses it takes about {approximate_size(CONTEXT_BYTES)} besides its segments, a donor of segment.size "
        f"{approximate_size(segment_bytes + CONTEXT_BYTES)} in all"
    )
    if "MIG" in name:
        return Finding(
            f"cuda:{ordinal}",
            State.NOTE,
            detail,
            "this is a MIG instance: processes share memory within it, not with other instances, which are other devices to CUDA",
        )
    if free < segment_bytes + CONTEXT_BYTES:
        fix = "to donate that much here, lower gpu_memory_utilization of the serving engine, or segment.size"
        return Finding(f"cuda:{ordinal}", State.NOTE, detail, fix)
    return Finding(f"cuda:{ordinal}", State.OK, detail)


def sharing(config: VCacheConfig, *, timeout_s: float) -> Iterator[Finding]:
    """Of each GPU whether others can open its memory by each kind of handle; of each pair whether one reads the other's.

    What is asked is done: a second process opens memory of this one, and says what is in it.
    """
    from vcache.memory.cuda_driver import can_read, device_count, device_uuid

    try:
        runtime = RuntimeDir(config.runtime_path)
    except ConfigError:
        return  # a finding of its own
    uuids = [device_uuid(ordinal) for ordinal in range(device_count())]
    for owner, uuid in enumerate(uuids):
        said = {kind: _refusal(runtime, owner, uuid, kind, timeout_s) for kind in KINDS}
        working = next((kind for kind, refusal in said.items() if not refusal), None)
        for kind, refusal in said.items():
            yield _of_kind(kind, owner, refusal, is_needed=config.segment.cuda_handles == kind or working is None)
        for reader, by in enumerate(uuids):
            if reader == owner or working is None:
                continue
            about = f"cuda:{reader} with memory of cuda:{owner}"
            if not can_read(reader, owner):
                detail = "no peer access: chunks there are misses here"
                yield Finding(about, State.NOTE, detail, "donate on each GPU that is to read (nvidia-smi topo -p2p r)")
            elif refusal := _refusal(runtime, owner, by, working, timeout_s):
                yield Finding(about, State.PROBLEM, refusal)
            else:
                yield Finding(about, State.OK, f"reads it directly ({KINDS[working].name})")


def pinning(config: VCacheConfig) -> Finding:
    """Whether GPUs can be given host memory of the pool to copy to and from on their own."""
    from vcache.memory.host import HostMemory
    from vcache.memory.pinned import pin

    about = "host memory of the pool"
    try:
        memory = HostMemory.create(RuntimeDir(config.runtime_path), secrets.token_bytes(16), PROBE_BYTES)
    except (ConfigError, CapacityError, UnavailableError, OSError) as error:
        return Finding(about, State.NOTE, str(error))
    try:
        pin(memory, device="cuda:0").end()
    except UnavailableError as error:
        detail = f"it cannot be pinned ({error}): GPUs load from it more slowly, and do not store into it"
        return Finding(
            about, State.PROBLEM, detail, "allow processes to lock memory, in containers too (ulimit -l unlimited)"
        )
    finally:
        memory.close()
    return Finding(about, State.OK, "it can be pinned: GPUs copy to and from it on their own")


def _of_kind(kind: HandleKind, ordinal: int, refusal: str, *, is_needed: bool) -> Finding:
    about = f"{KINDS[kind].name} on cuda:{ordinal}"
    if not refusal:
        return Finding(about, State.OK, "another process opens this one's memory and reads it")
    return Finding(about, State.PROBLEM if is_needed else State.NOTE, refusal, KINDS[kind].fix)


def _refusal(runtime: RuntimeDir, owner: int, reader: str, kind: HandleKind, timeout_s: float) -> str:
    """Why another process cannot use the GPU ``reader`` (a UUID) to read memory of ``owner``; empty if it can."""
    from vcache.memory.cuda import CudaMemory

    try:
        device = f"cuda:{owner}"
        memory = CudaMemory.create(runtime, secrets.token_bytes(16), PROBE_BYTES, device=device, handles=kind)
    except (CapacityError, UnavailableError, OSError) as error:
        return str(error)
    try:
        word = secrets.randbits(63)
        memory.words.store(1, word)
        memory.words.fence()
        arguments = [str(runtime.path), memory.handle.hex(), str(memory.nbytes), memory.device, reader]
        command = [sys.executable, "-m", "vcache.doctor.open_cuda", *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s + 60, check=False)
        except subprocess.TimeoutExpired as error:
            return str(error)
        if done.returncode or done.stdout.strip() != str(word):
            said = (done.stderr.strip().splitlines() or ["it read other bytes"])[-1]
            return f"another process cannot read this one's memory: {said}"
        return ""
    finally:
        memory.close()
