"""KV whose every byte follows from its tokens, so that whoever loads a block can tell whether it is the right one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from vcache.keys import ModelSpec

LAYERS, HEADS, HEAD_SIZE, BLOCK, CHUNK = 3, 2, 8, 4, 8
#: What a block holds that nobody has written: all ones in bfloat16's bits is a NaN no pattern below contains.
UNTOUCHED = 0xFF


def model_of(*, ranks: int = 1, layers: int = LAYERS, name: str = "test") -> ModelSpec:
    return ModelSpec(
        model=name,
        dtype="bfloat16",
        num_layers=layers,
        num_kv_heads=HEADS * ranks,
        head_size=HEAD_SIZE,
        block_size=BLOCK,
        chunk_size=CHUNK,
        tensor_parallel_size=ranks,
    )


def new_tensors(num_blocks: int, *, device: str = "cpu", layers: int = LAYERS) -> dict[str, torch.Tensor]:
    """Untouched KV tensors of one rank, block first: ``[num_blocks, 2, block, heads, head size]``."""
    shape = (num_blocks, 2, BLOCK, HEADS, HEAD_SIZE)
    return {
        f"layer.{layer}": torch.full((*shape, 2), UNTOUCHED, dtype=torch.uint8, device=device)
        .view(torch.bfloat16)
        .squeeze(-1)
        for layer in range(layers)
    }


def block_bytes(tensors: dict[str, torch.Tensor], block: int) -> bytes:
    """The bytes of one block in all layers."""
    parts = [tensor[block].contiguous().view(torch.uint8).cpu().numpy().tobytes() for tensor in tensors.values()]
    return b"".join(parts)


def expected_bytes(tensors: dict[str, torch.Tensor], prefix: Sequence[int], rank: int, salt: str) -> bytes:
    """What the block that ends ``prefix`` must hold: a hash of all its tokens, stretched over the block."""
    size = len(block_bytes(tensors, 0))
    seed = hashlib.sha256(repr((list(prefix), rank, salt)).encode()).digest()
    stretched = hashlib.shake_128(seed).digest(size)
    return (np.frombuffer(stretched, np.uint8) & 0x7F).tobytes()  # never UNTOUCHED


def fill(
    tensors: dict[str, torch.Tensor], tokens: Sequence[int], blocks: Sequence[int], *, rank: int = 0, salt: str = ""
) -> None:
    """Writes the KV of ``tokens`` into ``blocks``, the first of which holds the first block of tokens."""
    for index, block in enumerate(blocks):
        data = np.frombuffer(expected_bytes(tensors, tokens[: (index + 1) * BLOCK], rank, salt), np.uint8)
        size = data.size // len(tensors)
        for layer, tensor in enumerate(tensors.values()):
            part = torch.from_numpy(data[layer * size : (layer + 1) * size].copy()).to(tensor.device)
            tensor[block].view(torch.uint8).view(-1).copy_(part)


def wrong_blocks(
    tensors: dict[str, torch.Tensor],
    tokens: Sequence[int],
    blocks: Sequence[int],
    loaded: Sequence[bool],
    *,
    rank: int = 0,
    salt: str = "",
) -> list[int]:
    """Positions of the blocks that are not what ``loaded`` (one per token) says: the tokens' KV, or untouched."""
    wrong = []
    for index, block in enumerate(blocks):
        found = block_bytes(tensors, block)
        right = expected_bytes(tensors, tokens[: (index + 1) * BLOCK], rank, salt)
        if found != (right if loaded[index * BLOCK] else bytes([UNTOUCHED]) * len(found)):
            wrong.append(index)
    return wrong


def slots_of(blocks: Sequence[int]) -> torch.Tensor:
    """The slots of ``blocks``, token by token."""
    return torch.tensor([block * BLOCK + i for block in blocks for i in range(BLOCK)], dtype=torch.int64)
