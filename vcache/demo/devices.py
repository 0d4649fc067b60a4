"""The devices of the demo: two GPUs, one GPU twice, or two host devices; and the host's memory as the tier below."""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    """``name`` as VCache calls it; ``gpu`` is the CUDA index, None on a host."""

    name: str
    gpu: int | None


class Devices(NamedTuple):
    """Where engine A is, where engine B is, and where the DRAM tier is."""

    first: Device
    second: Device
    host: Device


def devices_here() -> Devices:
    """What this machine offers."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        other = min(1, count - 1)
        return Devices(Device("cuda:0", 0), Device(f"cuda:{other}", other), Device("cpu:0", None))
    return Devices(*(Device(f"cpu:{index}", None) for index in range(3)))
