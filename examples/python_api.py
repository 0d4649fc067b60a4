#!/usr/bin/env python3
"""Two engines share KV through the pool: the first stores a prompt's KV, the second finds and loads it.

Start a metadata server (`vcache server`), then run `python examples/python_api.py`. The engines stand for two serving
processes; here they live in one to keep the example short.
"""

import sys

import torch

from vcache import ModelSpec, VCacheConfig, VCacheEngine

LAYERS, HEADS, HEAD_SIZE, BLOCK, CHUNK, BLOCKS = 4, 8, 64, 16, 256, 64

model = ModelSpec(
    model="example/model",
    revision="1",
    dtype="bfloat16",
    num_layers=LAYERS,
    num_kv_heads=HEADS,
    head_size=HEAD_SIZE,
    block_size=BLOCK,
    chunk_size=CHUNK,
)
device = "cuda:0" if torch.cuda.is_available() else "cpu"


def kv_tensors() -> dict[str, torch.Tensor]:
    """One tensor per layer, as a serving engine holds them: [blocks, K and V, block size, heads, head size]."""
    shape = (BLOCKS, 2, BLOCK, HEADS, HEAD_SIZE)
    return {f"layer.{i}": torch.zeros(shape, dtype=torch.bfloat16, device=device) for i in range(LAYERS)}


def slots_of(blocks: torch.Tensor) -> torch.Tensor:
    """The slot of each token: its block's number times the block size, plus its place in the block."""
    return (blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()


def main() -> int:
    config = VCacheConfig()
    tokens = list(range(600))  # two whole chunks and a rest, which is not stored
    first_blocks = torch.arange(38)  # where the first engine has the prompt's 600 tokens
    second_blocks = torch.arange(38).flip(0)  # the second one has room elsewhere

    computed = kv_tensors()
    for tensor in computed.values():
        tensor.normal_()  # what a forward pass over the prompt would leave there
    wanted = kv_tensors()

    with (
        VCacheEngine(config, model=model, kv_caches=computed, donate="64MiB") as first,
        VCacheEngine(config, model=model, kv_caches=wanted) as second,
    ):
        if not first.get_stats()["server_available"]:
            print(f"no metadata server at {config.endpoint}: start one with `vcache server`", file=sys.stderr)
            return 1
        print("lookup before:", second.lookup(tokens), "tokens")
        first.store(tokens, slot_mapping=slots_of(first_blocks)[: len(tokens)])
        print("stored:       ", first.get_stats()["stored"], "chunks")
        print("lookup after: ", second.lookup(tokens), "tokens")
        loaded = second.retrieve(tokens, slot_mapping=slots_of(second_blocks)[: len(tokens)])
        print("loaded:       ", int(loaded.sum()), "tokens")

        chunks = 2 * CHUNK // BLOCK
        same = all(
            torch.equal(computed[name][first_blocks[:chunks]], wanted[name][second_blocks[:chunks]])
            for name in computed
        )
        print("same bytes:   ", same)
        return 0 if same and int(loaded.sum()) == 2 * CHUNK else 1


if __name__ == "__main__":
    sys.exit(main())
