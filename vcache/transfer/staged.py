"""Payloads that came into staging memory, on their way into the engine's planes, wherever these are."""

from __future__ import annotations

import numpy as np
import torch

from vcache.paged_kv import PagedKV
from vcache.transfer import scatter
from vcache.transfer.checks import Int64Array


def scatter_staged(
    kv: PagedKV, block_ids: Int64Array, staging: torch.Tensor, offsets: Int64Array, *, threads: int = 0
) -> None:
    """As ``scatter``, from host memory, which may be used for something else when it returns.

    For planes on a GPU this waits for the current stream.
    """
    if kv.device.type != "cuda":
        scatter(kv, block_ids, staging, offsets, threads=threads)
        return
    nbytes = kv.payload_bytes(block_ids.shape[1])
    payloads = torch.empty(len(offsets) * nbytes, dtype=torch.uint8, device=kv.device)
    for index, offset in enumerate(offsets.tolist()):
        payloads[index * nbytes : (index + 1) * nbytes].copy_(staging[offset : offset + nbytes])
    scatter(kv, block_ids, payloads, np.arange(len(offsets), dtype=np.int64) * nbytes)
    torch.cuda.current_stream(kv.device).synchronize()
