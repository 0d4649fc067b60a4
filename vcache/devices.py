"""Devices by the names that are the same in every process: a GPU's UUID, never its ordinal, or "cpu:0"."""

from __future__ import annotations

import torch


def default_device() -> torch.device:
    """The current GPU, else host memory."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu", 0)


def checked_device(device: str | torch.device) -> torch.device:
    """A host device or a GPU of this process with its ordinal, or a ``ValueError`` naming ``device``."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device = {device!r} is none: {str(error).splitlines()[0]}; use cuda:0 or cpu:0") from None
    if found.type == "cpu":
        return torch.device("cpu", found.index or 0)
    if found.type != "cuda":
        raise ValueError(f"device = {device!r}: only CUDA devices and host memory are supported; use cuda:0 or cpu:0")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = torch.cuda.current_device() if str(found) == "cuda" and count else (found.index or 0)
    if index >= count:
        raise ValueError(f"device = {device!r}: this process sees {count} CUDA devices")
    return torch.device("cuda", index)


def device_name(device: torch.device) -> str:
    """What the pool calls it."""
    if device.type == "cpu":
        return f"cpu:{device.index or 0}"
    return str(torch.cuda.get_device_properties(device).uuid)
