"""The two devices of the demo: two GPUs, one GPU twice, or two host devices."""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    """``name`` as VCache calls it; ``gpu`` is the CUDA index, None on a host."""

    name: str
    gpu: int | None


def two_devices() -> tuple[Device, Device]:
    """What this machine offers."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        return Device("cuda:0", 0), Device(f"cuda:{min(1, count - 1)}", min(1, count - 1))
    return Device("cpu:0", None), Device("cpu:1", None)
