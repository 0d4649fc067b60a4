"""The connector that LMCache is given copies the right blocks, whatever their order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.lmcache_peer import PagedStorage

BLOCK_SIZE = 4
CHUNK_BLOCKS = 3


@pytest.mark.parametrize(
    "block_ids",
    [[2, 3, 4, 5, 6, 7], [9, 1, 5, 0, 7, 3], [4, 9, 6, 0, 1, 2]],
    ids=["neighbours", "scattered", "first and last as far apart as neighbours"],
)
def test_blocks_go_out_and_come_back(block_ids):
    tensor = torch.arange(2 * 10 * BLOCK_SIZE * 8, dtype=torch.int16).view(torch.bfloat16).view(2, 10, BLOCK_SIZE, 8)
    numbers = tensor.view(torch.int16)
    storage = PagedStorage(tensor, np.array(block_ids))
    before = numbers.clone()
    tokens = CHUNK_BLOCKS * BLOCK_SIZE
    for start in (0, tokens):
        chunk = torch.empty(2 * tokens * 8, dtype=torch.bfloat16)
        ids = block_ids[start // BLOCK_SIZE :][:CHUNK_BLOCKS]
        storage.copy_out(chunk, start, start + tokens)
        assert torch.equal(chunk.view(torch.int16), before[:, ids].reshape(-1))
        numbers[:, ids] = -1
        storage.copy_in(chunk, start, start + tokens)
        assert torch.equal(numbers, before)
