"""Launches the copy kernels on the caller's stream; nothing here waits for the device."""

from __future__ import annotations

import torch

from vcache.paged_kv import PagedKV
from vcache.transfer.checks import Int64Array


def gather(kv: PagedKV, block_ids: Int64Array, segment: torch.Tensor, offsets: Int64Array) -> None:
    raise NotImplementedError


def scatter(kv: PagedKV, block_ids: Int64Array, segment: torch.Tensor, offsets: Int64Array) -> None:
    raise NotImplementedError
